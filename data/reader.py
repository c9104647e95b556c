"""Random access to the rows of a cohort, through a memory-mapped cache on local disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.cache import ensure, open_cache
from data.manifest import Manifest
from data.schema import N_CHANNELS
from data.tasks import CHEXPERT_LABELS

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Rows = NDArray[np.int64]

_KEYS = (
    "subject_id",
    "hadm_id",
    "stay_id",
    "dicom_id",
    "prediction_time",
    "split",
    "sex",
    "age",
    "labels",
)


@dataclass(frozen=True)
class Series:
    """The time series of some rows, one after the other.

    Attributes:
        values: [sum of lengths, 17] float32, before normalisation.
        observed: [sum of lengths, 17] uint8.
        lengths: [B] int64; 0 for a row without a series.
    """

    values: NDArray[np.float32]
    observed: NDArray[np.uint8]
    lengths: Rows


@dataclass(frozen=True)
class LabValues:
    """The laboratory results of some rows, one after the other.

    Attributes:
        items: N items.
        units: N units.
        values: [N] float32, before scaling.
        lengths: [B] int64; 0 for a row without labs. They sum to N.
    """

    items: list[str]
    units: list[str]
    values: NDArray[np.float32]
    lengths: Rows


class _Chunk:
    """Views of one record batch of the mapped cache; nothing is copied."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        series, masks = batch.column("ehr"), batch.column("ehr_observed")
        self._values = series.values.to_numpy()
        self._observed = masks.values.to_numpy()
        self._value_offsets = series.offsets.to_numpy()
        self._mask_offsets = masks.offsets.to_numpy()
        self._images = batch.column("cxr")
        self._batch = batch

    def series(self, row: int, length: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        first, mask_first = int(self._value_offsets[row]), int(self._mask_offsets[row])
        size = length * N_CHANNELS
        return self._values[first : first + size], self._observed[mask_first : mask_first + size]

    def image(self, row: int) -> bytes:
        return self._images[row].as_py()

    def value(self, column: str, row: int) -> Any:
        return self._batch.column(column)[row].as_py()


class ShardReader:
    """The rows of a shard folder, by their index in its manifest.

    Opening verifies the shards' hashes and builds the row cache where the node has none yet.

    Attributes:
        folder: The shard folder.
        manifest: Its manifest.
        lengths: [N] int64, bins of each row's series, 0 without one.
        has_ehr, has_cxr, has_notes, has_labs: [N] bool.
        labels: [N, C] float32.
        cxr_labels: [N, 14] float32, zeros where a row has none.
    """

    def __init__(self, folder: Path, cache_dir: Path | None = None) -> None:
        """Open the shards of `folder`.

        Raises:
            InputError: No manifest, a missing or altered shard, or a row that must be refused:
                above all one with `available_at` later than its prediction time.
        """
        self.folder = folder
        self.manifest = Manifest.load(folder)
        self.cache = ensure(folder, self.manifest, cache_dir)
        self._file = open_cache(self.cache)
        batches = [self._file.get_batch(i) for i in range(self._file.num_record_batches)]
        self._chunks = [_Chunk(batch) for batch in batches]
        sizes = np.array([batch.num_rows for batch in batches], np.int64)
        self._starts = np.cumsum(sizes) - sizes
        self._key_columns = pa.Table.from_batches(
            [batch.select(_KEYS) for batch in batches], schema=self._key_schema(_KEYS)
        )
        self._read_small_columns(batches)

    def __len__(self) -> int:
        """Rows of the cohort."""
        return len(self.lengths)

    def keys(self) -> pa.Table:
        """One row per sample, in order: row, ids, prediction_time, split, sex, age, labels.

        With has_ehr and has_cxr; `row` is the index that batches and predictions carry.
        """
        table = self._key_columns
        for name, values in (("has_cxr", self.has_cxr), ("has_ehr", self.has_ehr)):
            table = table.add_column(0, name, pa.array(values))
        return table.add_column(0, "row", pa.array(np.arange(len(self))))

    def rows_of(self, split: str) -> Rows:
        """Row ids of a split, in order."""
        return np.flatnonzero(self._splits == split).astype(np.int64)

    def subjects(self, rows: Rows) -> list[int]:
        """The subject_id of each row."""
        ids: list[int] = self._key_columns["subject_id"].take(rows).to_pylist()
        return ids

    def series(self, rows: Rows, max_steps: int | None = None) -> Series:
        """The series of `rows`, each cut to its first `max_steps` bins."""
        lengths = self.lengths[rows]
        if max_steps is not None:
            lengths = np.minimum(lengths, max_steps)
        values, observed = [], []
        for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
            if length:
                chunk, index = self._locate(row)
                row_values, row_observed = chunk.series(index, length)
                values.append(row_values)
                observed.append(row_observed)
        if not values:
            empty = np.zeros((0, N_CHANNELS), np.float32)
            return Series(empty, empty.astype(np.uint8), lengths)
        return Series(
            np.concatenate(values).reshape(-1, N_CHANNELS),
            np.concatenate(observed).reshape(-1, N_CHANNELS),
            lengths,
        )

    def image(self, row: int) -> bytes:
        """The JPEG bytes of a row that has an image."""
        chunk, index = self._locate(row)
        return chunk.image(index)

    def notes(self, rows: Rows) -> list[str | None]:
        """The kept note of each row, None without one."""
        return [self._value("notes", row) for row in rows.tolist()]

    def lab_texts(self, rows: Rows) -> list[str | None]:
        """The sentence of each row's abnormal results, None without any."""
        return [self._value("lab_text", row) for row in rows.tolist()]

    def lab_values(self, rows: Rows) -> LabValues:
        """The results of each row by item, before scaling."""
        columns = ("lab_items", "lab_units", "labs")
        items, units, values = (
            [self._value(column, row) or [] for row in rows.tolist()] for column in columns
        )
        return LabValues(
            [item for of_row in items for item in of_row],
            [unit for of_row in units for unit in of_row],
            np.array([value for of_row in values for value in of_row], np.float32),
            np.array([len(of_row) for of_row in values], np.int64),
        )

    def _value(self, column: str, row: int) -> Any:
        chunk, index = self._locate(row)
        return chunk.value(column, index)

    def _locate(self, row: int) -> tuple[_Chunk, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._chunks[number], row - int(self._starts[number])

    def _key_schema(self, names: tuple[str, ...]) -> pa.Schema:
        return pa.schema([self._file.schema.field(name) for name in names])

    def _read_small_columns(self, batches: list[pa.RecordBatch]) -> None:
        table = pa.Table.from_batches(batches, schema=self._file.schema)
        bins = pc.list_value_length(table["ehr"])
        self.lengths = bins.fill_null(0).to_numpy().astype(np.int64) // N_CHANNELS
        self.has_ehr = table["ehr"].is_valid().to_numpy()
        self.has_cxr = table["cxr"].is_valid().to_numpy()
        self.has_notes = table["notes"].is_valid().to_numpy()
        self.has_labs = table["labs"].is_valid().to_numpy()
        self.labels = _matrix(table["labels"], len(self.manifest.labels))
        self.cxr_labels = _matrix(table["cxr_labels"], len(CHEXPERT_LABELS))
        self._splits = np.array(table["split"].to_pylist(), dtype=object)


def _matrix(column: pa.ChunkedArray, width: int) -> NDArray[np.float32]:
    """[N, width]; a null list is a row of zeros."""
    matrix = np.zeros((len(column), width), np.float32)
    valid = column.is_valid().to_numpy()
    matrix[valid] = pc.list_flatten(column).to_numpy().reshape(-1, width)
    return matrix
