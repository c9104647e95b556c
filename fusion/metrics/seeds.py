"""A score over seeds: its mean and a 95 % interval (Student's t)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Sequence


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean, and lower and upper end; NaN for both of a single seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "lower": math.nan, "upper": math.nan}
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return {"mean": mean, "lower": mean - half, "upper": mean + half}


def cell(found: dict[str, float]) -> str:
    """An interval as a table's cell."""
    if math.isnan(found["lower"]):
        return f"{found['mean']:.3f} (one seed)"
    return f"{found['mean']:.3f} ({found['lower']:.3f} to {found['upper']:.3f})"
