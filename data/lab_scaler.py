"""Columns of the lab matrix: which items, in which unit, scaled how; fitted on the train split."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data.errors import InputError
from data.files import sha256_json
from data.kept import kept, read

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from data.batches import LabColumns
    from data.reader import LabValues, ShardReader

logger = logging.getLogger(__name__)

WHAT = "lab columns"
_FIT_ROWS = 4096


@dataclass(frozen=True)
class LabColumn:
    """One column.

    Attributes:
        item: As in the shards.
        unit: Results in any other unit count as unobserved.
        low: Clipped from below, in the unit, before `log`.
        high: Clipped from above.
        log: Whether log(1 + x) is taken.
    """

    item: str
    unit: str
    low: float
    high: float
    log: bool


@dataclass(frozen=True)
class LabScaler:
    """Results by item to a matrix in [0, 1] with a mask."""

    columns: tuple[LabColumn, ...]

    def apply(self, labs: LabValues) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """[B, K] float32 in [0, 1], zero where unobserved, and [B, K] bool: True = observed.

        A value outside a column's clipping range takes the border's value.
        """
        index = {(column.item, column.unit): k for k, column in enumerate(self.columns)}
        where = np.array([index.get(pair, -1) for pair in zip(labs.items, labs.units, strict=True)])
        rows = np.repeat(np.arange(len(labs.lengths)), labs.lengths)
        used = np.flatnonzero(where >= 0) if len(where) else np.zeros(0, np.int64)
        shape = (len(labs.lengths), len(self.columns))
        values, observed = np.zeros(shape, np.float32), np.zeros(shape, bool)
        if len(used):
            k = where[used]
            low, high = (np.array([getattr(c, e) for c in self.columns]) for e in ("low", "high"))
            log = np.array([column.log for column in self.columns])
            clipped = np.clip(labs.values[used].astype(np.float64), low[k], high[k])

            def drawn(x: NDArray[np.float64]) -> NDArray[np.float64]:
                return np.where(log[k], np.log1p(np.where(log[k], x, 0.0)), x)

            scaled = (drawn(clipped) - drawn(low[k])) / (drawn(high[k]) - drawn(low[k]))
            values[rows[used], k] = scaled
            observed[rows[used], k] = True
        return values, observed


def fit(reader: ShardReader, rows: NDArray[np.int64], config: LabColumns) -> LabScaler:
    """Choose and scale the columns by the labs of `rows`.

    The items with the most admissions are taken (ties by name). An item's unit is its most frequent
    one; a column whose clipped values are all equal says nothing and is left out for the next.

    Args:
        reader: The shards.
        rows: The train split.
        config: Number of items, quantiles, skewness from which the logarithm is taken.

    Raises:
        InputError: No row has a usable item.
    """
    values: dict[tuple[str, str], list[float]] = {}
    ordered = np.sort(rows)
    for start in range(0, len(ordered), _FIT_ROWS):
        labs = reader.lab_values(ordered[start : start + _FIT_ROWS])
        for item, unit, value in zip(labs.items, labs.units, labs.values.tolist(), strict=True):
            values.setdefault((item, unit), []).append(value)
    best: dict[str, tuple[int, str]] = {}
    for (item, unit), found in sorted(values.items()):
        if len(found) > best.get(item, (0, ""))[0]:
            best[item] = (len(found), unit)
    counts = {item: sum(len(v) for (i, _), v in _of(values, item)) for item in best}
    columns: list[LabColumn] = []
    for item in sorted(best, key=lambda name: (-counts[name], name)):
        column = _column(item, best[item][1], np.array(values[item, best[item][1]]), config)
        if column is None:
            logger.info("lab item %s: constant on the train split, left out", item)
        elif len(columns) < config.top:
            columns.append(column)
    if not columns:
        raise InputError(
            f"{reader.folder}: the train split has no lab item whose values differ; extract more "
            "admissions, or use a model without labs"
        )
    return LabScaler(tuple(columns))


def _of(
    values: dict[tuple[str, str], list[float]], item: str
) -> Iterable[tuple[tuple[str, str], list[float]]]:
    return ((key, found) for key, found in values.items() if key[0] == item)


def _column(
    item: str, unit: str, values: NDArray[np.float64], config: LabColumns
) -> LabColumn | None:
    low, high = np.quantile(values, config.clip)
    clipped = np.clip(values, low, high)
    if not high > low:
        return None
    spread = clipped.std()
    skew = float(np.mean(((clipped - clipped.mean()) / spread) ** 3)) if spread > 0 else 0.0
    log = config.log_skew is not None and skew > config.log_skew and low >= 0
    return LabColumn(item, unit, float(low), float(high), log)


def fitted(reader: ShardReader, config: LabColumns) -> LabScaler:
    """The columns of the train split, fitted once and kept beside the shards.

    The file is named by what it depends on: the shards, the split, and the configuration.
    """
    key = sha256_json([reader.manifest.digest, config.model_dump(mode="json")])

    def body() -> dict[str, Any]:
        scaler = fit(reader, reader.rows_of("train"), config)
        return {"columns": [vars(column) for column in scaler.columns]}

    return kept(reader.folder / f"labs-{key[:16]}-train.json", WHAT, body, _built)


def load(path: Path) -> LabScaler:
    """Read fitted columns.

    Raises:
        InputError: The file was altered or is no such file.
    """
    return read(path, WHAT, _built)


def _built(body: dict[str, Any]) -> LabScaler:
    return LabScaler(tuple(LabColumn(**column) for column in body["columns"]))
