"""What a row of a shard must satisfy before anything reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.errors import InputError
from data.schema import CHANNELS, CONTINUOUS, N_CHANNELS
from data.tasks import CHEXPERT_LABELS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    Refuse = Callable[[NDArray[np.bool_], str, str], None]

_CATEGORICAL = [v for v in range(N_CHANNELS) if v not in CONTINUOUS]
_LEVELS = np.array([len(CHANNELS[v].levels) for v in _CATEGORICAL], np.float32)


def check_rows(batch: pa.RecordBatch, first_row: int, place: Path, n_labels: int) -> None:
    """Refuse a batch with a row whose features were not yet known, or that is malformed.

    Args:
        batch: Columns of SHARD_SCHEMA.
        first_row: Index in the manifest of the batch's first row.
        place: The shard, for messages.
        n_labels: Labels of the task.

    Raises:
        InputError: Names the shard, the row and the column of the first such row.
    """

    def refuse(bad: NDArray[np.bool_], column: str, why: str) -> None:
        if bad.any():
            row = first_row + int(np.argmax(bad))
            raise InputError(f"{place}: row {row}, column {column}: {why}; extract again")

    for modality in ("ehr", "cxr", "notes", "labs"):
        _check_known(batch, modality, refuse)
    lengths = _lengths(batch.column("ehr"))
    refuse(
        (lengths != _lengths(batch.column("ehr_observed")))
        | (np.maximum(lengths, 0) % N_CHANNELS != 0),
        "ehr_observed",
        f"the series and its mask are not both T x {N_CHANNELS}",
    )
    refuse(lengths == 0, "ehr", "an empty series (an absent one is null)")
    _check_values(batch, lengths, refuse)
    refuse(_lengths(batch.column("labels")) != n_labels, "labels", f"not {n_labels} labels")
    extra = _lengths(batch.column("cxr_labels"))
    refuse(
        (extra >= 0) & (extra != len(CHEXPERT_LABELS)),
        "cxr_labels",
        f"not {len(CHEXPERT_LABELS)} labels",
    )
    _check_labs(batch, refuse)
    nothing = np.ones(batch.num_rows, bool)
    for modality in ("ehr", "cxr", "notes", "labs"):
        nothing &= _null(batch.column(modality))
    refuse(nothing, "ehr", "neither a series nor an image, a note or labs")


def _check_known(batch: pa.RecordBatch, modality: str, refuse: Refuse) -> None:
    """The firewall: a modality is used only if all of it was known at the prediction time."""
    present = ~_null(batch.column(modality))
    available, prediction = (
        batch.column(f"{modality}_available_at"),
        batch.column("prediction_time"),
    )
    column = f"{modality}_available_at"
    late = pc.fill_null(pc.greater(available, prediction), False)
    refuse(present & late.to_numpy(zero_copy_only=False), column, "later than prediction_time")
    if modality != "ehr":
        refuse(present & _null(available) & ~_null(prediction), column, "null")
        return
    refuse(present & _null(prediction), "prediction_time", "null beside a series")
    undated = present & _null(available)
    for row in np.flatnonzero(undated):
        undated[row] = np.asarray(batch.column("ehr_observed")[int(row)].values).any()
    refuse(undated, column, "null beside observed values")


def _check_values(batch: pa.RecordBatch, lengths: NDArray[np.int64], refuse: Refuse) -> None:
    values = batch.column("ehr").flatten().to_numpy().reshape(-1, N_CHANNELS)
    levels = values[:, _CATEGORICAL]
    with np.errstate(invalid="ignore"):
        wrong = (levels < 0) | (levels >= _LEVELS) | (levels != np.floor(levels))
    bins = np.maximum(lengths, 0) // N_CHANNELS
    row_of = np.repeat(np.arange(len(lengths)), bins)
    observed = batch.column("ehr_observed").flatten().to_numpy().reshape(-1, N_CHANNELS)
    for bad, column, why in (
        (~np.isfinite(values), "ehr", "a value that is not finite"),
        (wrong, "ehr", "a level index that its channel does not have"),
        (observed > 1, "ehr_observed", "a mask that is not 0 or 1"),
    ):
        rows = row_of[bad.any(axis=1)]
        refuse(np.bincount(rows, minlength=len(lengths)) > 0, column, why)


def _check_labs(batch: pa.RecordBatch, refuse: Refuse) -> None:
    """Items, numbers and units of a row belong together; an unobserved item is not listed."""
    lengths = _lengths(batch.column("labs"))
    for column in ("lab_items", "lab_units"):
        refuse(lengths != _lengths(batch.column(column)), column, "not one for each of labs")
    refuse(lengths == 0, "labs", "an empty list (absent labs are null)")
    row_of = np.repeat(np.arange(len(lengths)), np.maximum(lengths, 0))
    values = batch.column("labs").flatten().to_numpy(zero_copy_only=False)
    bad = row_of[~np.isfinite(values)]
    refuse(np.bincount(bad, minlength=len(lengths)) > 0, "labs", "a value that is not finite")


def _null(column: pa.Array) -> NDArray[np.bool_]:
    return column.is_null().to_numpy(zero_copy_only=False)


def _lengths(column: pa.Array) -> NDArray[np.int64]:
    """Items of each list, -1 for null."""
    return pc.fill_null(pc.list_value_length(column), -1).to_numpy().astype(np.int64)
