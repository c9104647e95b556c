"""From texts to the vectors of a trained text encoder, as evaluation sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from data.files import sha256_file, sha256_json
from fusion.encoders.text_base import find_base
from fusion.encoders.text_store import Extractor, template
from fusion.hashed import digest
from fusion.training.objective import autocast
from fusion.training.references import stored_references

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from fusion.encoders.text import TextEncoder, TextOptions
    from fusion.training.config import TrainConfig

TOKENIZER: Final = ("tokenizer.json", "tokenizer_config.json")
_PREFIX: Final = "text."


def extractor_of(
    options: TextOptions,
    config: TrainConfig,
    weights: Mapping[str, Tensor],
    meta: Mapping[str, Any],
) -> Extractor:
    """What decides the vectors of a run's text encoder; its base's weights are not read for it.

    Args:
        options: Of the run's model.
        config: Its passes' precision.
        weights: Its best ones, as `read_weights` gives them.
        meta: Likewise.

    Raises:
        InputError: The base is not there.
    """
    folder = find_base(options.backbone, revision=options.revision, offline=options.offline).folder
    files = [folder / name for name in TOKENIZER]
    base = stored_references(meta).get(_PREFIX.rstrip("."))
    trained = {name: value for name, value in weights.items() if name.startswith(_PREFIX)}
    return Extractor(
        options=template(options),
        precision=config.precision,
        base_sha256=base.sha256 if base else None,
        tokenizer_sha256=sha256_json({f.name: sha256_file(f) for f in files if f.is_file()}),
        weights_sha256=digest(trained),
    )


@torch.no_grad()
def text_vectors(
    text: TextEncoder, pairs: Sequence[tuple[str, str]], config: TrainConfig, budget: int
) -> tuple[Tensor, Tensor]:
    """The vectors of texts, in passes of texts of similar length.

    Args:
        text: With its weights, in evaluation mode.
        pairs: N notes with sentences of results, either of which may be empty.
        config: Precision of a pass.
        budget: Most tokens of a pass, padding counted.

    Returns:
        [N, D] float32 vectors, zeros for a text without a token; [N, 3] int32: tokens (0 for such
        a text), and tokens of the note and of the results that were cut.
    """
    read = [text.tokens(*pair) for pair in pairs]
    device = next(text.model.parameters()).device
    vectors = torch.zeros(len(read), text.width)
    counts = torch.zeros(len(read), 3, dtype=torch.int32)
    real = [place for place, tokens in enumerate(read) if not tokens.empty]
    for group in text.groups([read[place].length for place in real], budget):
        places = [real[number] for number in group]
        chosen = [read[place] for place in places]
        with autocast(device, config):
            vectors[places] = text(chosen).cpu()
        counts[places] = torch.tensor(
            [[each.length, each.note_cut, each.labs_cut] for each in chosen], dtype=torch.int32
        )
    return vectors, counts
