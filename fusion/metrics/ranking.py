"""AUROC and average precision, exact, for many labels and many weightings of the rows at once.

Both are functions of the rows' order, and a resample only changes how often each row counts. So a
label is sorted once; what lies between two positives is summed by one sparse product for a block
of weightings; and cumulative sums over the positives give both scores. Ties are groups, as in
sklearn: half a win each in AUROC, one threshold in average precision (Davis and Goadrich 2006).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from numpy.typing import NDArray

_EXACT_FLOAT32 = 2**24
_CHUNK = 1024  # ties at once: with a block of resamples they stay in a core's cache


class RankedLabel:
    """One label's rows in order of score; `scores(weights)` ranks them under any weights.

    Args:
        targets: [N], 0 or 1.
        scores: [N], higher means more likely; finite.
        groups: [N], which column of the weights each row takes; default its own index.
        n_groups: Number of groups; default the largest index + 1.

    Raises:
        ValueError: Shapes differ, a target is not 0 or 1, or a score is not finite.
    """

    def __init__(
        self,
        targets: NDArray[Any],
        scores: NDArray[Any],
        groups: NDArray[Any] | None = None,
        n_groups: int | None = None,
    ) -> None:
        targets, scores = np.asarray(targets), np.asarray(scores, np.float64)
        if targets.ndim != 1 or targets.shape != scores.shape:
            raise ValueError(f"targets {targets.shape} and scores {scores.shape} must be [N]")
        if not np.isin(targets, (0, 1)).all():
            raise ValueError("targets must be 0 or 1")
        if not np.isfinite(scores).all():
            raise ValueError("scores must be finite")
        rows = np.arange(len(targets)) if groups is None else np.asarray(groups)
        self.n_groups = (int(rows.max(initial=-1)) + 1) if n_groups is None else n_groups
        positive = targets == 1
        self._totals = np.stack(
            [np.bincount(rows[member], minlength=self.n_groups) for member in (positive, ~positive)]
        ).astype(np.float64)
        self._chunks = self._segment(positive, scores, rows)

    def _segment(
        self, positive: NDArray[np.bool_], scores: NDArray[np.float64], rows: NDArray[Any]
    ) -> list[sparse.csr_matrix]:
        """For each run of ties with positives: [3 m, n_groups] sums, one third after the other.

        Of each tie the positives, the negatives tied with them, and the negatives between it and
        the tie before.
        """
        order = np.argsort(-scores, kind="stable")
        positive, rows, ordered = positive[order], rows[order], scores[order]
        first = np.ones(len(ordered), bool)
        first[1:] = ordered[1:] != ordered[:-1]
        tie = np.cumsum(first) - 1
        with_positive = np.zeros(len(ordered), bool)
        with_positive[tie[positive]] = True
        # For each tie: the number of ties with a positive before it.
        rank = (np.cumsum(with_positive) - with_positive)[tie]
        third = np.where(positive, 0, np.where(with_positive[tie], 1, 2))
        ties = int(with_positive.sum())
        chunks = []
        for start in range(0, ties, _CHUNK):
            size = min(_CHUNK, ties - start)
            own = slice(*np.searchsorted(rank, (start, start + size)))
            segment = third[own] * size + rank[own] - start
            ones = np.ones(len(segment), np.float32)
            shape = (3 * size, self.n_groups)
            chunks.append(sparse.coo_matrix((ones, (segment, rows[own])), shape=shape).tocsr())
        return chunks

    def scores(
        self, weights: NDArray[np.floating]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """AUROC and average precision, [R] each, under `weights` [n_groups, R].

        NaN where the rows of positive weight lack a class. Exact for whole-number weights.
        """
        n_positive, n_negative = self._totals @ weights.astype(np.float64, copy=False)
        true, false, wins, average = np.zeros((4, weights.shape[1]))
        for segments in self._chunks:
            sums = np.asarray(segments @ weights, np.float64)
            positives, tied, above = sums.reshape(3, -1, weights.shape[1])
            above[0] += false
            above[1:] += tied[:-1]
            np.cumsum(above, axis=0, out=above)
            wins += np.einsum("tr,tr->r", positives, n_negative - above - 0.5 * tied)
            above += tied
            found = np.cumsum(positives, axis=0)
            found += true
            false, true = above[-1].copy(), found[-1].copy()
            above += found
            np.divide(found, above, out=found, where=above > 0)
            average += np.einsum("tr,tr->r", positives, found)
        with np.errstate(divide="ignore", invalid="ignore"):
            wins /= n_positive * n_negative
            average /= n_positive
        lacking = (n_positive == 0) | (n_negative == 0)
        wins[lacking] = np.nan
        average[lacking] = np.nan
        return wins, average


def weight_dtype(total: float) -> type[np.floating]:
    """The narrowest float in which sums of whole-number weights up to `total` are exact."""
    return np.float32 if total < _EXACT_FLOAT32 else np.float64


def auroc(targets: NDArray[Any], scores: NDArray[Any]) -> NDArray[np.float64]:
    """Area under the ROC curve of each label.

    Args:
        targets: [N, C], 0 or 1.
        scores: [N, C], probabilities or logits.

    Returns:
        [C]; NaN for a label whose targets lack a class.
    """
    return _each_label(targets, scores)[0]


def average_precision(targets: NDArray[Any], scores: NDArray[Any]) -> NDArray[np.float64]:
    """Average precision (AUPRC) of each label: [N, C] twice -> [C]; NaN where a class lacks."""
    return _each_label(targets, scores)[1]


def macro(values: NDArray[np.floating]) -> float:
    """The mean over the labels that have a value; NaN if none has."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def _each_label(
    targets: NDArray[Any], scores: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    targets, scores = np.asarray(targets), np.asarray(scores)
    if targets.ndim != 2 or targets.shape != scores.shape:
        raise ValueError(f"targets {targets.shape} and scores {scores.shape} must be [N, C]")
    ones = np.ones((len(targets), 1))
    both = np.array(
        [
            np.concatenate(RankedLabel(target, score).scores(ones))
            for target, score in zip(targets.T, scores.T, strict=True)
        ]
    ).reshape(targets.shape[1], 2)
    return both[:, 0], both[:, 1]
