"""The arithmetic of benchmarks/planted_notes.py: probes that can fail and succeed, best guesses."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import roc_auc_score

from data.sources.synthetic.clinical import present_illness
from data.tasks import ELIXHAUSER_LABELS

_PATH = Path(__file__).parents[2] / "benchmarks" / "planted_notes.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_planted_notes", _PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_probe_fails_on_the_guard_and_succeeds_on_a_leak(bench):
    rng = np.random.default_rng(3)
    latents = rng.integers(0, 2, (1200, 4))
    notes = [present_illness(row, False, rng) for row in latents]
    leak = [f"{note} asthma" if row[3] else note for note, row in zip(notes, latents, strict=True)]
    for texts, least, most in ((notes, 0.42, 0.58), (leak, 0.99, 1.0)):
        bag = CountVectorizer().fit_transform(texts)
        scores = bench.logistic(bag[:800], latents[:800, 2:], bag[800:])
        assert scores.shape == (400, 2)
        assert least <= roc_auc_score(latents[800:, 3], scores[:, 1]) <= most


def test_every_label_has_a_kind(bench):
    six = bench.KINDS[bench.MEAN]
    rest = [name for names in bench.KINDS.values() if len(names) == 4 for name in names]
    assert sorted((*six, *rest)) == sorted(ELIXHAUSER_LABELS)
    targets = np.eye(len(ELIXHAUSER_LABELS))
    assert set(bench._by_kind(targets, targets, ELIXHAUSER_LABELS).values()) == {1.0}
    assert set(bench._by_kind(targets, -targets, ELIXHAUSER_LABELS).values()) == {0.0}
