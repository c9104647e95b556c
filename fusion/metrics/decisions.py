"""Scores of decisions: labels whose probability reaches a threshold, against what is true.

Precision, recall and F1 of each label and their macro means; F1 weighted by each label's positives;
F1 of all decisions as one (micro); the share of right decisions (Hamming accuracy); the share of
rows with every label right. A ratio without a denominator is 0, as in sklearn. Intervals resample
patients as in `fusion.metrics.bootstrap`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.metrics.bootstrap import Scores, group_index, interval, resample_counts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

HALF = 0.5
MEANS = (
    "precision",
    "recall",
    "f1",
    "weighted_f1",
    "micro_f1",
    "accuracy",
    "subset_accuracy",
)
"""Scores over all labels; the first three are macro means."""


def macro_f1(targets: NDArray[Any], probabilities: NDArray[Any], threshold: float = HALF) -> float:
    """Mean F1 of the labels, [N, C] twice; a label that is neither true nor decided has 0."""
    truth, decided = np.asarray(targets) == 1, np.asarray(probabilities) >= threshold
    counts = _by_group(truth, decided, np.zeros(len(truth), np.intp), 1)
    return float(_scores(counts, np.ones((1, 1)))[1][MEANS.index("f1"), 0])


def best_thresholds(targets: NDArray[Any], probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """[C] for each label the probability seen from which on deciding gives the highest F1.

    Of equal ones the highest; 0.5 for a label without positives.
    """
    targets = np.asarray(targets) == 1
    probabilities = np.asarray(probabilities, np.float64)
    return np.array(
        [_best_threshold(y, p) for y, p in zip(targets.T, probabilities.T, strict=True)]
    )


def decisions(
    targets: NDArray[Any],
    probabilities: NDArray[Any],
    groups: NDArray[Any] | None = None,
    *,
    thresholds: Sequence[float] | NDArray[np.float64],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Every score with its interval.

    Args:
        targets: [N, C], 0 or 1.
        probabilities: [N, C].
        groups: [N], the patient of each row; None resamples rows.
        thresholds: [C], a label is decided from its own on.
        resamples: How many.
        seed: As in `bootstrap`: equal seeds and groups give equal resamples.

    Returns:
        JSON: thresholds, `means` (name -> interval) and `labels`, for each label precision, recall
        and f1.
    """
    labels, means, label_draws, mean_draws = _resampled(
        targets, probabilities, groups, thresholds, resamples, seed
    )
    return {
        "thresholds": [float(value) for value in thresholds],
        "means": {
            name: interval(float(means[m]), mean_draws[m]).to_json() for m, name in enumerate(MEANS)
        },
        "labels": [
            {
                name: interval(float(labels[m, c]), label_draws[m, c]).to_json()
                for m, name in enumerate(MEANS[:3])
            }
            for c in range(labels.shape[1])
        ],
    }


def f1_scores(
    targets: NDArray[Any],
    probabilities: NDArray[Any],
    groups: NDArray[Any] | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Scores:
    """F1 at 0.5 of each label and micro F1, in the resamples of `bootstrap`.

    Args:
        targets: [N, C], 0 or 1.
        probabilities: [N, C].
        groups: [N], the patient of each row; None resamples rows.
        resamples: How many.
        seed: As in `bootstrap`.
    """
    thresholds = np.full(np.shape(targets)[1], HALF)
    labels, means, label_draws, mean_draws = _resampled(
        targets, probabilities, groups, thresholds, resamples, seed
    )
    of_label, micro = MEANS.index("f1"), MEANS.index("micro_f1")
    return Scores(
        {"f1": np.append(labels[of_label], means[micro])},
        {"f1": np.concatenate([label_draws[of_label], mean_draws[micro][None]])},
    )


def _resampled(
    targets: NDArray[Any],
    probabilities: NDArray[Any],
    groups: NDArray[Any] | None,
    thresholds: Sequence[float] | NDArray[np.float64],
    resamples: int,
    seed: int,
) -> tuple[NDArray[np.float64], ...]:
    """[3, C] scores of labels and [7] means, then those of R resamples, [3, C, R] and [7, R]."""
    truth = np.asarray(targets) == 1
    decided = np.asarray(probabilities, np.float64) >= np.asarray(thresholds, np.float64)
    index, n_groups = group_index(groups, len(truth))
    counts = _by_group(truth, decided, index, n_groups)
    labels, means = _scores(counts, np.ones((n_groups, 1)))
    drawn = [_scores(counts, block) for block in resample_counts(n_groups, resamples, seed)]
    label_draws = np.concatenate([each[0] for each in drawn], axis=2)
    mean_draws = np.concatenate([each[1] for each in drawn], axis=1)
    return labels[..., 0], means[:, 0], label_draws, mean_draws


def _best_threshold(targets: NDArray[np.bool_], probabilities: NDArray[np.float64]) -> float:
    if not targets.any():
        return HALF
    order = np.argsort(-probabilities, kind="stable")
    ordered = probabilities[order]
    right = np.cumsum(targets[order])
    f1 = 2 * right / (targets.sum() + np.arange(1, len(order) + 1))
    # Equal probabilities are decided together: only the last of them is a place to cut.
    last = np.append(ordered[1:] != ordered[:-1], True)
    return float(ordered[np.argmax(np.where(last, f1, -1.0))])


def _by_group(
    truth: NDArray[np.bool_], decided: NDArray[np.bool_], index: NDArray[np.intp], n_groups: int
) -> NDArray[np.float64]:
    """[3 C + 2, n_groups]: each label's right positives, its positives, those decided; whole; rows.

    A row is whole if every label of it is right.
    """
    columns = [
        *(truth & decided).T,
        *truth.T,
        *decided.T,
        (truth == decided).all(1),
        np.ones(len(truth)),
    ]
    return np.stack([np.bincount(index, column, n_groups) for column in columns])


def _scores(
    counts: NDArray[np.float64], weights: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[3, C, R] precision, recall and F1 of labels, and [7, R] the means."""
    sums = counts @ weights.astype(np.float64, copy=False)
    right, positive, decided = np.split(sums[:-2], 3)
    whole, rows = sums[-2], sums[-1]
    labels = np.stack(
        [
            _ratio(right, decided),
            _ratio(right, positive),
            _ratio(2 * right, positive + decided),
        ]
    )
    wrong = (positive + decided - 2 * right).sum(0)
    means = [
        *labels.mean(1),
        _ratio((labels[2] * positive).sum(0), positive.sum(0)),
        _ratio(2 * right.sum(0), (positive + decided).sum(0)),
        1 - wrong / (rows * len(right)),
        whole / rows,
    ]
    return labels, np.stack(means)


def _ratio(over: NDArray[Any], under: NDArray[Any]) -> NDArray[np.float64]:
    over = np.asarray(over, np.float64)
    return np.divide(over, under, out=np.zeros_like(over), where=np.asarray(under) > 0)
