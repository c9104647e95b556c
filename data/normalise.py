"""Means and deviations of the 12 continuous channels: published, or fitted on the train split."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from data.errors import InputError
from data.kept import kept, read
from data.schema import CHANNELS, CONTINUOUS, FEATURE_NAMES

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from data.batches import BatchConfig
    from data.reader import ShardReader

CONTINUOUS_COLUMNS = [FEATURE_NAMES.index(CHANNELS[v].name) for v in CONTINUOUS]
"""Columns of the 76 features that a normaliser touches, in the order of CONTINUOUS."""

STD_FLOOR = 1e-7
WHAT = "normaliser"
_FIT_ROWS = 1024


@dataclass(frozen=True)
class Normalizer:
    """z = (x - mean) / std on the 12 numeric columns; one-hot levels and masks stay as they are.

    Attributes:
        means: [12], in the order of CONTINUOUS.
        stds: [12].
        zero_beyond: Normalised values beyond +-this become 0 (DrFuse's released loader: 10).
    """

    means: tuple[float, ...]
    stds: tuple[float, ...]
    zero_beyond: float | None = None

    def __post_init__(self) -> None:
        if len(self.means) != len(CONTINUOUS) or len(self.stds) != len(CONTINUOUS):
            raise ValueError(f"a normaliser has {len(CONTINUOUS)} means and deviations")

    def apply(self, features: NDArray[np.float32]) -> None:
        """Normalise [N, 76] features in place, in float64."""
        z = features[:, CONTINUOUS_COLUMNS].astype(np.float64)
        z -= np.array(self.means)
        z /= np.array(self.stds)
        if self.zero_beyond is not None:
            z[np.abs(z) > self.zero_beyond] = 0.0
        features[:, CONTINUOUS_COLUMNS] = z


PUBLISHED = Normalizer(
    means=(
        61.73746731237323,
        0.2941986945120962,
        140.38699662380586,
        85.53853938464474,
        169.80350234321443,
        79.59640838796953,
        104.98108350952208,
        19.867925156740334,
        122.3975667186341,
        36.94399135355236,
        83.76208973419455,
        7.207267791681239,
    ),
    stds=(
        221.89647947315552,
        0.1714931950435367,
        1766.7412133808477,
        57.11693013941011,
        6.222631784123813,
        148.53013549514117,
        5135.238732591619,
        7.3213287278950965,
        141.3988560835634,
        5.277914736088037,
        27.233083363220278,
        1.6568268628593597,
    ),
)
"""Statistics of the MIMIC-III phenotyping benchmark at one-hour bins, before any outlier removal,
which the MedFuse and DrFuse authors ship and use for every task and for MIMIC-IV."""


def fit(reader: ShardReader, rows: NDArray[np.int64]) -> Normalizer:
    """Mean and deviation (N - 1, at least 1e-7) of every channel over all bins of `rows`.

    Two passes in float64; the sums over rows are exact (math.fsum), so the order of rows changes
    no bit. Bins are taken after imputation.

    Raises:
        InputError: The rows hold fewer than two bins.
    """
    sums, bins = _row_sums(reader, rows, np.zeros(len(CONTINUOUS)), power=1)
    if bins < 2:
        raise InputError(
            f"{reader.folder}: the train split has {bins} time bins, too few to fit a normaliser; "
            "extract more stays, or set data.batches.normalizer=published"
        )
    means = np.array([math.fsum(column) / bins for column in sums.T])
    squares, _ = _row_sums(reader, rows, means, power=2)
    stds = [max(math.sqrt(math.fsum(column) / (bins - 1)), STD_FLOOR) for column in squares.T]
    return Normalizer(tuple(means.tolist()), tuple(stds))


def _row_sums(
    reader: ShardReader, rows: NDArray[np.int64], means: NDArray[np.float64], *, power: int
) -> tuple[NDArray[np.float64], int]:
    """Per row, the sums over its bins of (x - mean) ** power: [rows with a series, 12]."""
    parts = [np.zeros((0, len(CONTINUOUS)))]
    bins = 0
    ordered = np.sort(rows)
    for start in range(0, len(ordered), _FIT_ROWS):
        series = reader.series(ordered[start : start + _FIT_ROWS])
        lengths = series.lengths[series.lengths > 0]
        if len(lengths):
            x = series.values[:, list(CONTINUOUS)].astype(np.float64) - means
            firsts = np.cumsum(lengths) - lengths
            parts.append(np.add.reduceat(x if power == 1 else x * x, firsts, axis=0))
            bins += int(lengths.sum())
    return np.concatenate(parts), bins


def fitted(reader: ShardReader) -> Normalizer:
    """The statistics of the train split, fitted once and kept beside the shards.

    The file is named by what it depends on: the shards (the manifest's digest), split, preset.
    """
    manifest = reader.manifest
    name = f"normalizer-{manifest.digest[:16]}-train-{manifest.preset}.json"

    def body() -> dict[str, Any]:
        normalizer = fit(reader, reader.rows_of("train"))
        return {
            "channels": [CHANNELS[v].name for v in CONTINUOUS],
            "means": list(normalizer.means),
            "stds": list(normalizer.stds),
        }

    return kept(reader.folder / name, WHAT, body, _built)


def load(path: Path) -> Normalizer:
    """Read the statistics of a fitted normaliser.

    Raises:
        InputError: The file was altered or is no such file.
    """
    return read(path, WHAT, _built)


def _built(body: dict[str, Any]) -> Normalizer:
    return Normalizer(tuple(body["means"]), tuple(body["stds"]))


def normalizer_for(reader: ShardReader, config: BatchConfig) -> Normalizer:
    """The normaliser a run asks for, with its `zero_beyond`; a cohort of images needs no fit."""
    fits = config.normalizer == "fitted" and reader.has_ehr.any()
    chosen = fitted(reader) if fits else PUBLISHED
    return replace(chosen, zero_beyond=config.zero_beyond)
