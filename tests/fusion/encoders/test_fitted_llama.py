"""A small Llama written for benchmarks is a backbone like any other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fusion.encoders.fitted_llama import write_llama
from fusion.encoders.text import TextEncoder, TextOptions

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = ["The fever came before the cough.", "First there was cough, and then fever."] * 20


def test_it_is_read_as_a_backbone_and_knows_the_words(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    write_llama(folder, TEXTS, vocabulary=300, width=16, layers=1, heads=2)
    written = (folder / "config.json").read_bytes()
    write_llama(folder, ["other"], vocabulary=400, width=32, layers=2, heads=2)
    assert (folder / "config.json").read_bytes() == written, "what is there stays"
    options = TextOptions(
        backbone=str(folder), random_weights=True, adapter="full", max_length=64, text="notes"
    )
    torch.manual_seed(0)
    encoder = TextEncoder(options)
    one, other = (encoder.tokens(text, "") for text in TEXTS[:2])
    assert one.ids[0] == 0, "the beginning-of-text token"
    assert len(one.ids) < len(TEXTS[0]) / 2, "tokens are words more than bytes"
    vectors = encoder([one, other])
    assert vectors.shape == (2, 16)
    assert not torch.allclose(vectors[0], vectors[1])
