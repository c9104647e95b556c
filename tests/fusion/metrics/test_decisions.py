"""Decisions against literal counting, the paper's own arithmetic, and planted thresholds."""

from __future__ import annotations

import numpy as np
import pytest

from fusion.metrics.decisions import HALF, MEANS, best_thresholds, decisions, macro_f1


def _literal(targets, decided):
    """One label after the other, one row after the other."""
    found = {}
    labels = []
    for c in range(targets.shape[1]):
        tp = sum(1 for y, d in zip(targets[:, c], decided[:, c], strict=True) if y and d)
        fp = sum(1 for y, d in zip(targets[:, c], decided[:, c], strict=True) if not y and d)
        fn = sum(1 for y, d in zip(targets[:, c], decided[:, c], strict=True) if y and not d)
        precision = tp / (tp + fp) if tp + fp else 0.0
        recall = tp / (tp + fn) if tp + fn else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        labels.append((precision, recall, f1, tp, fp, fn))
    for place, name in enumerate(("precision", "recall", "f1")):
        found[name] = sum(label[place] for label in labels) / len(labels)
    support = [label[3] + label[5] for label in labels]
    weighted = sum(label[2] * n for label, n in zip(labels, support, strict=True))
    found["weighted_f1"] = weighted / sum(support) if sum(support) else 0.0
    tp, fp, fn = (sum(label[place] for label in labels) for place in (3, 4, 5))
    found["micro_f1"] = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0
    found["accuracy"] = float((targets == decided).mean())
    found["subset_accuracy"] = float((targets == decided).all(1).mean())
    return found


@pytest.fixture
def drawn():
    rng = np.random.default_rng(5)
    targets = (rng.random((60, 6)) < [0.5, 0.3, 0.1, 0.0, 1.0, 0.4]).astype(float)
    probabilities = np.clip(0.5 * targets + rng.random((60, 6)) * 0.7, 0, 1)
    probabilities[:, 5] *= 0.4  # never decided
    return targets, probabilities, rng.integers(0, 25, 60)


def test_scores_are_those_of_literal_counting(drawn):
    targets, probabilities, _ = drawn
    thresholds = [0.5, 0.6, 0.7, 0.5, 0.9, 0.5]
    found = decisions(targets, probabilities, thresholds=thresholds, resamples=3)
    expected = _literal(targets == 1, probabilities >= thresholds)
    assert set(found["means"]) == set(MEANS) == set(expected)
    for name, value in expected.items():
        assert found["means"][name]["value"] == pytest.approx(value, abs=1e-12), name
    assert found["labels"][5]["precision"]["value"] == 0


def test_intervals_resample_patients(drawn):
    targets, probabilities, subjects = drawn
    found = decisions(targets, probabilities, subjects, thresholds=[HALF] * 6, resamples=40, seed=3)
    names, index = np.unique(subjects, return_inverse=True)
    generator = np.random.default_rng(3)
    scores = []
    for _ in range(40):
        drawn_patients = generator.integers(0, len(names), len(names))
        rows = np.concatenate([np.flatnonzero(index == patient) for patient in drawn_patients])
        scores.append(_literal(targets[rows] == 1, probabilities[rows] >= HALF))
    for name in MEANS:
        low, high = np.percentile([score[name] for score in scores], (2.5, 97.5))
        assert found["means"][name]["lower"] == pytest.approx(low, abs=1e-12), name
        assert found["means"][name]["upper"] == pytest.approx(high, abs=1e-12), name


@pytest.mark.parametrize(("share", "printed"), [(0.8333, 0.1818), (0.6790, 0.1618)])
def test_the_papers_collapsed_row(share, printed):
    """Phan et al. (2024), Table 1, BERT: two of ten labels always on, F1 2p / (1 + p) each."""
    rows = 10_000
    targets = np.zeros((rows, 10))
    targets[: round(share * rows), :2] = 1
    probabilities = np.zeros((rows, 10))
    probabilities[:, :2] = 0.9
    found = decisions(targets, probabilities, thresholds=[HALF] * 10, resamples=1)["means"]
    assert found["f1"]["value"] == pytest.approx(printed, abs=5e-5)
    assert found["recall"]["value"] == pytest.approx(0.2)
    assert macro_f1(targets, probabilities) == pytest.approx(found["f1"]["value"], abs=1e-12)


def test_thresholds_are_the_best_of_all(drawn):
    targets, probabilities, _ = drawn
    probabilities = probabilities.round(2)  # ties
    chosen = best_thresholds(targets, probabilities)
    assert chosen[3] == HALF, "a label without positives"
    for c in (0, 1, 2, 4, 5):
        one = slice(c, c + 1)
        scores = {
            cut: macro_f1(targets[:, one], probabilities[:, one], cut)
            for cut in np.unique(probabilities[:, c])
        }
        assert scores[chosen[c]] == max(scores.values())
        assert chosen[c] == max(cut for cut, score in scores.items() if score == scores[chosen[c]])
