"""How well hidden values are told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.floating]


def root_mean_squared_error(told: Values, values: Values, chosen: NDArray[np.bool_]) -> float:
    """Of `told` (broadcast to [N, K]) from `values` [N, K], where `chosen` [N, K] is True."""
    errors = np.broadcast_to(told, values.shape)[chosen].astype(np.float64) - values[chosen]
    return float(np.sqrt(np.mean(errors**2)))


def binned_mean(x: Values, y: Values, at: Values, bins: int = 20) -> Values:
    """E[y | x] by the mean of y in quantiles of x, read off where x is `at`.

    Args:
        x: [N].
        y: [N].
        at: [M].
        bins: Quantiles; one without a value of x tells 0, which distinct values never leave.
    """
    edges = np.quantile(x, np.linspace(0, 1, bins + 1)[1:-1])
    place = np.searchsorted(edges, x)
    total, count = np.bincount(place, y, bins), np.bincount(place, minlength=bins)
    return (total / np.maximum(count, 1))[np.searchsorted(edges, at)]
