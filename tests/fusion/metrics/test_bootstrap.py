"""The vectorised bootstrap against sklearn on rows that are really repeated."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from fusion.metrics.bootstrap import bootstrap, interval, resample_counts


def _data(rows: int = 90, labels: int = 4, patients: int = 40, seed: int = 0) -> tuple:
    rng = np.random.default_rng(seed)
    targets = (rng.random((rows, labels)) < np.linspace(0.15, 0.6, labels)).astype(np.int64)
    scores = np.clip(np.round(0.3 * targets + 0.6 * rng.random((rows, labels)), 2), 0, 1)
    return targets, scores, 700 + rng.integers(0, patients, rows)


def _naive(targets: np.ndarray, scores: np.ndarray, drawn: np.ndarray, rows_of: list) -> np.ndarray:
    """[3, C + 1] of one resample, its patients' rows concatenated."""
    rows = np.concatenate([rows_of[patient] for patient in drawn])
    columns = [(targets[rows, c], scores[rows, c]) for c in range(targets.shape[1])]
    columns.append((targets[rows].ravel(), scores[rows].ravel()))
    found = np.full((3, len(columns)), np.nan)
    for c, (y, p) in enumerate(columns):
        found[2, c] = brier_score_loss(y, p) if len(set(y)) == 2 else np.mean((p - y) ** 2)
        if len(set(y)) == 2:
            found[0, c], found[1, c] = roc_auc_score(y, p), average_precision_score(y, p)
    return found


@pytest.mark.parametrize("by", ["patient", "row"])
def test_equals_the_naive_form_resample_by_resample(by: str) -> None:
    targets, scores, subjects = _data()
    groups = subjects if by == "patient" else np.arange(len(subjects))
    found = bootstrap(targets, scores, subjects if by == "patient" else None, resamples=60, seed=3)
    names = np.unique(groups)
    rows_of = [np.flatnonzero(groups == name) for name in names]
    generator = np.random.default_rng(3)
    for r in range(60):
        drawn = generator.integers(0, len(names), len(names))
        expected = _naive(targets, scores, drawn, rows_of)
        for m, metric in enumerate(("auroc", "auprc", "brier")):
            np.testing.assert_allclose(found.draws[metric][:, r], expected[m], atol=1e-12)


def test_points_are_the_rows_own_scores() -> None:
    targets, scores, subjects = _data()
    found = bootstrap(targets, scores, subjects, resamples=2)
    for c in range(4):
        assert found.point["auroc"][c] == pytest.approx(roc_auc_score(targets[:, c], scores[:, c]))
    assert found.point["auroc"][-1] == pytest.approx(roc_auc_score(targets.ravel(), scores.ravel()))
    assert found.mean("auroc").value == pytest.approx(roc_auc_score(targets, scores))


def test_counts_do_not_depend_on_the_block() -> None:
    whole = np.concatenate(list(resample_counts(13, 50, seed=1, block=50)), axis=1)
    parts = np.concatenate(list(resample_counts(13, 50, seed=1, block=7)), axis=1)
    np.testing.assert_array_equal(whole, parts)
    assert (whole.sum(0) == 13).all()
    assert not np.array_equal(whole, np.concatenate(list(resample_counts(13, 50, 2)), axis=1))


def test_patients_with_equal_rows_widen_the_interval() -> None:
    """Ten copies of each row under one patient hold no more than the row itself."""
    targets, scores, _ = _data(rows=60)
    one = bootstrap(targets, scores, np.arange(60), resamples=300).label("auroc", 2)
    copies = np.repeat(np.arange(60), 10)
    grouped = bootstrap(targets[copies], scores[copies], copies, resamples=300).label("auroc", 2)
    assert (grouped.value, grouped.lower, grouped.upper) == pytest.approx(
        (one.value, one.lower, one.upper)
    )
    by_row = bootstrap(targets[copies], scores[copies], None, resamples=300).label("auroc", 2)
    assert by_row.upper - by_row.lower < 0.5 * (grouped.upper - grouped.lower)


def test_a_constant_predictor_has_auroc_one_half_exactly() -> None:
    targets, _, subjects = _data()
    found = bootstrap(targets, np.full(targets.shape, 0.4), subjects, resamples=100)
    assert (found.draws["auroc"] == 0.5).all()
    assert found.label("auroc", 0).to_json() == {
        "value": 0.5,
        "lower": 0.5,
        "upper": 0.5,
        "skipped": 0,
    }


def test_interval_covers_the_point_and_the_mean_is_narrower_than_the_mean_of_intervals() -> None:
    targets, scores, _ = _data(rows=300, labels=8)
    found = bootstrap(targets, scores, None, resamples=500)
    for metric in ("auroc", "auprc"):
        of_mean, of_labels = found.mean(metric), found.mean_of_labels(metric)
        assert of_mean.value == pytest.approx(of_labels.value)
        assert of_mean.lower < of_mean.value < of_mean.upper
        assert of_labels.lower < of_mean.lower
        assert of_mean.upper < of_labels.upper
        each = [found.label(metric, c) for c in range(8)]
        assert of_labels.lower == pytest.approx(np.mean([one.lower for one in each]))


def test_intervals_of_a_fair_test_cover_at_their_level() -> None:
    """Of 200 samples of a known AUROC of 0.76, about 95 % have it in their interval."""
    rng = np.random.default_rng(7)
    targets = np.tile(np.arange(150)[:, None] % 2, (1, 200))
    scores = rng.normal(size=targets.shape) + targets
    found = bootstrap(targets, scores / 100, None, resamples=200)
    covered = [(one := found.label("auroc", c)).lower <= 0.76025 <= one.upper for c in range(200)]
    assert 0.90 <= np.mean(covered) <= 0.985


def test_resamples_that_lack_a_class_are_skipped_and_counted() -> None:
    targets = np.zeros((12, 2), np.int64)
    targets[:6, 0] = 1
    targets[0, 1] = 1
    scores = np.linspace(0, 1, 24).reshape(12, 2)
    found = bootstrap(targets, scores, None, resamples=400, seed=5)
    counts = np.concatenate(list(resample_counts(12, 400, 5)), axis=1)
    without = int((counts[0] == 0).sum())
    assert 100 < without < 200
    assert found.label("auroc", 1).skipped == without
    assert found.mean("auroc").skipped >= without
    assert found.label("brier", 1).skipped == 0


def test_a_label_without_positives_has_no_value_and_leaves_the_mean() -> None:
    targets, scores, subjects = _data()
    targets[:, 1] = 0
    found = bootstrap(targets, scores, subjects, resamples=50)
    assert found.label("auroc", 1).value is None
    assert found.label("brier", 1).value is not None
    expected = np.mean([roc_auc_score(targets[:, c], scores[:, c]) for c in (0, 2, 3)])
    assert found.mean("auroc").value == pytest.approx(expected)
    assert found.mean("auroc", [1]).value is None


def test_no_interval_from_a_minority_of_resamples() -> None:
    draws = np.full(100, np.nan)
    draws[:49] = 0.7
    assert interval(0.7, draws).lower is None
    draws[:50] = 0.7
    assert interval(0.7, draws).lower == 0.7


def test_refuses_no_rows() -> None:
    with pytest.raises(ValueError, match="no row"):
        bootstrap(np.zeros((0, 2)), np.zeros((0, 2)))
