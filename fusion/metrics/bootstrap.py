"""Confidence intervals: patients are drawn with replacement, every score is taken anew.

Rows of one patient are not independent, so a resample draws patients (each `group`) and takes all
rows of each; with one group a row it is the papers' bootstrap over rows. Percentile intervals. A
resample in which a label lacks a class has no AUROC; it is skipped for that label, and counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fusion.metrics.ranking import RankedLabel, weight_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

Metric = Literal["auroc", "auprc", "brier"]
METRICS: tuple[Metric, ...] = ("auroc", "auprc", "brier")
LEVEL = 0.95
MIN_USED = 0.5
"""Share of the resamples that must have had both classes for an interval to be given."""
_BLOCK = 16  # resamples at once: 12,000 rows then stay in a core's second-level cache


@dataclass(frozen=True)
class Interval:
    """A score with its percentile interval; None where it is not defined.

    Attributes:
        value: The score of the rows themselves.
        lower: 2.5th percentile over the resamples used.
        upper: 97.5th percentile.
        skipped: Resamples that lacked a class.
    """

    value: float | None
    lower: float | None
    upper: float | None
    skipped: int

    def to_json(self) -> dict[str, Any]:
        """A plain mapping."""
        return {
            "value": self.value,
            "lower": self.lower,
            "upper": self.upper,
            "skipped": self.skipped,
        }


@dataclass(frozen=True)
class Scores:
    """Each metric of each label, of the rows as they are and under each resample.

    Attributes:
        point: Metric -> [C + 1]; the last entry is micro (all labels' decisions as one).
        draws: Metric -> [C + 1, R]. NaN where a class lacked.
    """

    point: dict[str, NDArray[np.float64]]
    draws: dict[str, NDArray[np.float64]]

    @property
    def n_labels(self) -> int:
        """C."""
        return len(next(iter(self.point.values()))) - 1

    def label(self, metric: str, index: int) -> Interval:
        """One label's score; index -1 is micro."""
        return interval(float(self.point[metric][index]), self.draws[metric][index])

    def mean(self, metric: str, labels: Sequence[int] | None = None) -> Interval:
        """The macro mean, resampled as a whole, over `labels` (default all) that are defined.

        A label whose rows lack a class is left out of the mean; a resample that lacks a class of
        any other label is skipped.
        """
        chosen = self._defined(metric, labels)
        if not len(chosen):
            return Interval(None, None, None, self.draws[metric].shape[1])
        mean = self.point[metric][chosen].mean()
        return interval(float(mean), self.draws[metric][chosen].mean(0))

    def mean_of_labels(self, metric: str, labels: Sequence[int] | None = None) -> Interval:
        """The macro mean with the mean of the labels' lower and of their upper bounds.

        The papers' way (wider than the interval of the mean). `skipped` is the largest of them.
        """
        chosen = self._defined(metric, labels)
        each = [self.label(metric, int(index)) for index in chosen]
        skipped = max((one.skipped for one in each), default=self.draws[metric].shape[1])
        if not each:
            return Interval(None, None, None, skipped)
        mean = float(self.point[metric][chosen].mean())
        lower = [one.lower for one in each if one.lower is not None]
        upper = [one.upper for one in each if one.upper is not None]
        if len(lower) < len(each):
            return Interval(mean, None, None, skipped)
        return Interval(mean, float(np.mean(lower)), float(np.mean(upper)), skipped)

    def _defined(self, metric: str, labels: Sequence[int] | None) -> NDArray[np.intp]:
        chosen = np.arange(self.n_labels) if labels is None else np.asarray(labels, np.intp)
        return chosen[~np.isnan(self.point[metric][chosen])]


def interval(value: float, draws: NDArray[np.float64]) -> Interval:
    """The percentile interval of the draws [R] that are not NaN."""
    used = draws[~np.isnan(draws)]
    skipped = len(draws) - len(used)
    if np.isnan(value):
        return Interval(None, None, None, skipped)
    if not len(used) or len(used) < MIN_USED * len(draws):
        return Interval(value, None, None, skipped)
    tail = 50 * (1 - LEVEL)
    lower, upper = np.percentile(used, (tail, 100 - tail))
    return Interval(value, float(lower), float(upper), skipped)


def group_index(groups: NDArray[Any] | None, rows: int) -> tuple[NDArray[np.intp], int]:
    """Groups of any type -> [N] indices and their number; None makes each row its own group."""
    if groups is None:
        return np.arange(rows), rows
    names, index = np.unique(groups, return_inverse=True)
    return index, len(names)


def resample_counts(
    n_groups: int, resamples: int, seed: int, block: int = _BLOCK
) -> Iterator[NDArray[np.uint32]]:
    """How often each group is drawn: blocks [n_groups, <= block], the same for any block size."""
    generator = np.random.default_rng(seed)
    for first in range(0, resamples, block):
        width = min(block, resamples - first)
        counts = np.empty((n_groups, width), np.uint32)
        for column in range(width):
            drawn = generator.integers(0, n_groups, n_groups)
            counts[:, column] = np.bincount(drawn, minlength=n_groups)
        yield counts


def bootstrap(
    targets: NDArray[Any],
    probabilities: NDArray[Any],
    groups: NDArray[Any] | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Scores:
    """AUROC, average precision and Brier score of each label and micro, and of each resample.

    Args:
        targets: [N, C], 0 or 1.
        probabilities: [N, C].
        groups: [N], the patient of each row; None resamples rows.
        resamples: R.
        seed: The same seed and groups give the same resamples, whatever the scores.
    """
    targets = np.asarray(targets)
    probabilities = np.asarray(probabilities, np.float64)
    rows, labels = _check(targets, probabilities)
    index, n_groups = group_index(groups, rows)
    ranked = [
        RankedLabel(target, score, index, n_groups)
        for target, score in zip(targets.T, probabilities.T, strict=True)
    ]
    ranked.append(
        RankedLabel(targets.ravel(), probabilities.ravel(), np.repeat(index, labels), n_groups)
    )
    errors = _group_errors(targets, probabilities, index, n_groups)
    largest = np.bincount(index, minlength=n_groups).max(initial=0) * n_groups * labels
    point = _score(ranked, errors, np.ones((n_groups, 1)))
    draws = np.empty((len(METRICS), labels + 1, resamples))
    first = 0
    for counts in resample_counts(n_groups, resamples, seed):
        weights = counts.astype(weight_dtype(float(largest)))
        draws[:, :, first : first + counts.shape[1]] = _score(ranked, errors, weights)
        first += counts.shape[1]
    return Scores(
        point={name: point[m, :, 0] for m, name in enumerate(METRICS)},
        draws={name: draws[m] for m, name in enumerate(METRICS)},
    )


def _check(targets: NDArray[Any], probabilities: NDArray[np.float64]) -> tuple[int, int]:
    if targets.ndim != 2 or targets.shape != probabilities.shape:
        raise ValueError(
            f"targets {targets.shape} and probabilities {probabilities.shape} must be [N, C]"
        )
    if targets.size == 0:
        raise ValueError("there is no row to score")
    return targets.shape[0], targets.shape[1]


def _group_errors(
    targets: NDArray[Any],
    probabilities: NDArray[np.float64],
    index: NDArray[np.intp],
    n_groups: int,
) -> NDArray[np.float64]:
    """[n_groups, C + 2]: squared errors of each label and of all, and the number of rows."""
    squared = (probabilities - targets.astype(np.float64)) ** 2
    columns = [*squared.T, squared.mean(1), np.ones(len(index))]
    return np.stack([np.bincount(index, column, n_groups) for column in columns], axis=1)


def _score(
    ranked: list[RankedLabel], errors: NDArray[np.float64], weights: NDArray[np.floating]
) -> NDArray[np.float64]:
    """[3 metrics, C + 1, R]."""
    both = np.array([one.scores(weights) for one in ranked])
    sums = errors.T @ weights.astype(np.float64, copy=False)
    return np.concatenate([both.transpose(1, 0, 2), (sums[:-1] / sums[-1])[None]])
