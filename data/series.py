"""From events of stays to regular series: bins, imputation, and the 76 columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from data.schema import CHANNELS, CONTINUOUS, N_CHANNELS, N_FEATURES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from data.duplicates import Points

EPSILON: Final = 1e-6
"""Hours: the released tolerance at borders of bins and of the window."""
NEVER: Final = np.iinfo(np.int64).min
_US_PER_HOUR: Final = 3_600_000_000
NORMAL: Final = np.asarray(
    [
        channel.levels.index(channel.normal) if channel.levels else float(channel.normal)
        for channel in CHANNELS
    ],
    dtype=np.float32,
)
"""[17] what stands before a channel's first value; of a categorical channel the level's index."""


_WIDTHS = [len(channel.levels) or 1 for channel in CHANNELS]
_FIRST = np.concatenate([[0], np.cumsum(_WIDTHS)[:-1]])
_CATEGORICAL = tuple(v for v in range(N_CHANNELS) if v not in CONTINUOUS)


def expand(
    values: NDArray[np.floating], observed: NDArray[np.integer | np.bool_]
) -> NDArray[np.float32]:
    """The model's columns: one-hot levels, numbers, then the 17 masks (MedFuse's discretiser).

    Args:
        values: [T, 17], imputed, before normalisation; a categorical channel holds a level index.
        observed: [T, 17], nonzero where the bin was observed.

    Returns:
        [T, 76] float32 in the order of FEATURE_NAMES.
    """
    steps = values.shape[0]
    columns = np.zeros((steps, N_FEATURES), dtype=np.float32)
    columns[:, _FIRST[list(CONTINUOUS)]] = values[:, list(CONTINUOUS)]
    rows = np.arange(steps)
    for v in _CATEGORICAL:
        columns[rows, _FIRST[v] + values[:, v].astype(np.int64)] = 1.0
    columns[:, N_FEATURES - N_CHANNELS :] = observed
    return columns


@dataclass(frozen=True)
class Grid:
    """Regular series of several stays, one below the other.

    Attributes:
        values: [sum of T, 17] imputed; a categorical channel holds a level index.
        observed: [sum of T, 17], 1 where the bin was observed.
        first: [S + 1] the first row of each stay, and the end.
        available: [S] microseconds since intime at which the latest used value was known;
            `NEVER` for a stay without any.
    """

    values: NDArray[np.float32]
    observed: NDArray[np.uint8]
    first: NDArray[np.int64]
    available: NDArray[np.int64]


def bin_count(hours: NDArray[np.float64], timestep: float) -> NDArray[np.int64]:
    """Bins in so many hours, at least one: an end on a border opens no bin of its own."""
    return np.maximum((hours / timestep + 1 - EPSILON).astype(np.int64), 1)


def discretise(points: Points, steps: NDArray[np.int64], timestep: float) -> Grid:
    """Put values into bins (k, k + 1]: the last of a bin wins, an empty bin repeats the one before.

    Before a channel's first value stands its normal value (mimic3-benchmarks' discretiser,
    `previous`). The first bin also holds hour 0.

    Args:
        points: Sorted by (stay, channel, offset), all inside their stay's window.
        steps: [S] bins of each stay, >= 1.
        timestep: Hours in a bin.
    """
    first = np.concatenate([[0], np.cumsum(steps)])
    bins = (points.offset / _US_PER_HOUR / timestep - EPSILON).astype(np.int64)
    within = np.minimum(bins, steps[points.stay] - 1)
    cell = (first[points.stay] + within) * N_CHANNELS + points.channel
    last = np.append(cell[1:] != cell[:-1], True)[: len(cell)]
    observed = np.zeros((first[-1], N_CHANNELS), dtype=np.uint8)
    observed.reshape(-1)[cell[last]] = 1
    values = np.zeros((first[-1], N_CHANNELS), dtype=np.float32)
    values[first[:-1]] = NORMAL
    values.reshape(-1)[cell[last]] = points.number[last]
    available = np.full(len(steps), NEVER)
    np.maximum.at(available, points.stay[last], points.available[last])
    return Grid(_filled(values, observed, first[:-1]), observed, first, available)


def _filled(
    values: NDArray[np.float32], observed: NDArray[np.uint8], starts: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Each cell takes the value of the latest row of its stay that has one (its first row does)."""
    filled = np.empty_like(values)
    rows = np.arange(len(values), dtype=np.int32)
    begins = np.zeros(len(values), dtype=bool)
    begins[starts] = True
    for v in range(N_CHANNELS):
        source = np.where(begins | (observed[:, v] == 1), rows, 0)
        filled[:, v] = values[np.maximum.accumulate(source), v]
    return filled
