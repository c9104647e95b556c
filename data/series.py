"""From events of stays to regular series: bins, imputation, and the 76 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data.schema import CHANNELS, CONTINUOUS, N_CHANNELS, N_FEATURES

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
