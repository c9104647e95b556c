"""Are the probabilities right? Curve, expected calibration error, and logistic recalibration.

The error is the mean gap between predicted and observed shares over equal-width bins, weighted by
their rows (Guo et al. 2017). Slope and intercept fit logit P(y=1) = a + b logit(p) by maximum
likelihood (Cox 1958): a = 0 and b = 1 are perfect, b < 1 is overconfident.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_EDGE = 1e-12
_MAX_STEPS = 100
_TOLERANCE = 1e-10
_SEPARATED = 1e6


def calibration(
    targets: NDArray[Any], probabilities: NDArray[Any], bins: int = 10
) -> dict[str, Any]:
    """One label's calibration.

    Args:
        targets: [N], 0 or 1.
        probabilities: [N], in [0, 1].
        bins: Equal-width bins of [0, 1]; empty ones are left out of the curve.

    Returns:
        `curve`: a list of {rows, positives, predicted, observed}; `ece`; `slope` and `intercept`,
        None where a class lacks or the fit does not exist (all probabilities equal, or classes
        that a threshold separates).
    """
    y = np.asarray(targets, np.float64)
    p = np.asarray(probabilities, np.float64)
    rows, positives, predicted = _binned(y, p, bins)
    filled = rows > 0
    curve = [
        {
            "rows": int(n),
            "positives": int(k),
            "predicted": float(total / n),
            "observed": float(k / n),
        }
        for n, k, total in zip(rows[filled], positives[filled], predicted[filled], strict=True)
    ]
    fit = recalibration(y, p)
    return {
        "curve": curve,
        "ece": expected_calibration_error(y, p, bins),
        "intercept": None if fit is None else fit[0],
        "slope": None if fit is None else fit[1],
    }


def expected_calibration_error(
    targets: NDArray[Any], probabilities: NDArray[Any], bins: int = 10
) -> float:
    """Sum over bins of (rows / N) |mean probability - share of positives|."""
    y = np.asarray(targets, np.float64)
    p = np.asarray(probabilities, np.float64)
    _, positives, predicted = _binned(y, p, bins)
    return float(np.abs(predicted - positives).sum() / len(y))


def recalibration(
    targets: NDArray[np.float64], probabilities: NDArray[np.float64]
) -> tuple[float, float] | None:
    """Intercept and slope by Newton's method with halved steps; None where no maximum exists."""
    p = np.clip(probabilities, _EDGE, 1 - _EDGE)
    z = np.log(p) - np.log1p(-p)
    if targets.min() == targets.max() or np.ptp(z) < _EDGE or _separable(targets, z):
        return None
    design = np.stack([np.ones_like(z), z], axis=1)
    beta = np.array([0.0, 1.0])
    loss = _loss(design @ beta, targets)
    for _ in range(_MAX_STEPS):
        fitted = 0.5 * (1 + np.tanh(0.5 * (design @ beta)))
        gradient = design.T @ (fitted - targets)
        if np.abs(gradient).max() < _TOLERANCE * len(z):
            return float(beta[0]), float(beta[1])
        curvature = (design * (fitted * (1 - fitted))[:, None]).T @ design
        step = np.linalg.lstsq(curvature, gradient, rcond=None)[0]
        size = 1.0
        while (new := _loss(design @ (beta - size * step), targets)) > loss and size > 1e-10:
            size /= 2
        beta, loss = beta - size * step, min(new, loss)
        if np.abs(beta).max() > _SEPARATED:
            return None
    return None


def _binned(
    y: NDArray[np.float64], p: NDArray[np.float64], bins: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    place = np.minimum((p * bins).astype(np.intp), bins - 1)
    return (
        np.bincount(place, minlength=bins),
        np.bincount(place, y, bins),
        np.bincount(place, p, bins),
    )


def _separable(y: NDArray[np.float64], z: NDArray[np.float64]) -> bool:
    positive, negative = z[y == 1], z[y == 0]
    return bool(positive.min() >= negative.max() or negative.min() >= positive.max())


def _loss(logits: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    return float((np.logaddexp(0, logits) - y * logits).sum())
