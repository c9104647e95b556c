"""predictions.parquet: one row a sample, readable by its owner only; the basis of comparisons."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data.errors import InputError
from data.files import PRIVATE, atomic_path

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa
    from numpy.typing import NDArray

FILE_NAME = "predictions.parquet"
KEYS = (
    "subject_id",
    "hadm_id",
    "stay_id",
    "dicom_id",
    "prediction_time",
    "split",
    "sex",
    "age",
    "has_cxr",
)
"""Columns beside `probabilities` and `labels`."""
_IDENTITY = ("subject_id", "stay_id", "dicom_id", "prediction_time")
_METADATA = b"rayfuse"


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a model says of each row of a split.

    Attributes:
        keys: Table of the KEYS columns, N rows.
        probabilities: [N, C] float32.
        targets: [N, C] float32, 0 or 1.
        labels: The C labels' names.
        lineage: Run, model, preset, task, hashes of manifest and weights, synthetic or not.
    """

    keys: pa.Table
    probabilities: NDArray[np.float32]
    targets: NDArray[np.float32]
    labels: tuple[str, ...]
    lineage: dict[str, Any]

    @property
    def subjects(self) -> NDArray[np.int64]:
        """[N] patients."""
        return self.keys["subject_id"].to_numpy()

    @property
    def has_cxr(self) -> NDArray[np.bool_]:
        """[N] rows with an image."""
        return self.keys["has_cxr"].to_numpy()

    @property
    def age(self) -> NDArray[np.float64]:
        """[N] years, NaN where unknown."""
        return self.keys["age"].to_numpy().astype(np.float64)

    @property
    def sex(self) -> NDArray[np.object_]:
        """[N] F, M or None."""
        return np.array(self.keys["sex"].to_pylist(), dtype=object)


def write(path: Path, predictions: Predictions) -> None:
    """Write them whole or not at all, mode 0600; names and lineage go into Parquet's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = predictions.keys.select(KEYS)
    for name, values in (
        ("probabilities", predictions.probabilities),
        ("labels", predictions.targets),
    ):
        table = table.append_column(name, pa.array(list(values), pa.list_(pa.float32())))
    metadata = {"labels": list(predictions.labels), "lineage": predictions.lineage}
    table = table.replace_schema_metadata({_METADATA: json.dumps(metadata, sort_keys=True)})
    with atomic_path(path) as temporary:
        # Created private before a byte of a patient's is written.
        temporary.touch(mode=PRIVATE)
        pq.write_table(table, temporary)
        temporary.chmod(PRIVATE)


def read(path: Path) -> Predictions:
    """Read a file that `write` wrote.

    Raises:
        InputError: It is missing, or not such a file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise InputError(f"{path}: no predictions; run `rayfuse evaluate` on that run first")
    try:
        table = pq.read_table(path)
        metadata = json.loads((table.schema.metadata or {})[_METADATA])
        labels = tuple(metadata["labels"])
        return Predictions(
            keys=table.select(KEYS),
            probabilities=_matrix(table["probabilities"], len(labels)),
            targets=_matrix(table["labels"], len(labels)),
            labels=labels,
            lineage=metadata["lineage"],
        )
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise InputError(
            f"{path}: not a predictions file of `rayfuse evaluate` ({error}); evaluate again"
        ) from None


def same_rows(first: Predictions, second: Predictions) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Orders that bring both onto the same rows, or None where rows, labels or targets differ."""
    if first.labels != second.labels or len(first.keys) != len(second.keys):
        return None
    orders = [_order(one.keys) for one in (first, second)]
    sorted_keys = [
        one.keys.select(_IDENTITY).take(order).combine_chunks()
        for one, order in zip((first, second), orders, strict=True)
    ]
    if not sorted_keys[0].equals(sorted_keys[1]):
        return None
    if not np.array_equal(first.targets[orders[0]], second.targets[orders[1]]):
        return None
    return orders[0], orders[1]


def _order(keys: pa.Table) -> NDArray[np.int64]:
    import pyarrow.compute as pc

    sorting = [(name, "ascending") for name in _IDENTITY]
    return pc.sort_indices(keys, sort_keys=sorting).to_numpy().astype(np.int64)


def _matrix(column: pa.ChunkedArray, width: int) -> NDArray[np.float32]:
    flat = column.combine_chunks().flatten().to_numpy()
    return flat.reshape(len(column), width).astype(np.float32)
