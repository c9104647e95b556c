"""Whether a shard folder is what its manifest says, and keeps the rules of a cohort."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import InputError
from data.files import sha256_file, sha256_json
from data.manifest import Manifest
from data.row_checks import check_rows
from data.schema import SCHEMA_VERSION, SHARD_SCHEMA
from data.shards import load_excluded, missing_classes
from data.splits import SPLITS

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["check", "missing_classes"]

_EXAMPLES = 5


def check(out: Path) -> list[str]:
    """Every problem of a shard folder, one line each; an empty list is a sound folder.

    Hashes, schema, values, point in time (nothing was known later than the prediction time),
    label ranges, unique sample keys, subjects in one split and one shard only.

    Raises:
        InputError: There is no manifest, or it cannot be read.
    """
    manifest = Manifest.load(out)
    problems: list[str] = []
    if sha256_json(manifest.config) != manifest.config_hash:
        problems.append("manifest.json: config_hash is not the hash of config; extract again")
    problems += _unlisted(out, manifest)
    try:
        load_excluded(out, manifest)
    except InputError as error:
        problems.append(str(error))
    seen = _Seen()
    first_row = 0
    for file in manifest.files:
        path = out / file.name
        found = _check_file(path, file.sha256, file.rows)
        problems += found
        if not found:
            problems += _check_shard(path, first_row, manifest, seen)
        first_row += file.rows
    if not problems and seen.rows_of != manifest.splits:
        problems.append(f"manifest.json: splits say {manifest.splits}, the shards {seen.rows_of}")
    return problems


class _Seen:
    """What the shards before held.

    Attributes:
        split_of: subject_id -> its split.
        shard_of: subject_id -> its shard.
        keys: Keys of the samples.
        rows_of: Rows of each split.
    """

    def __init__(self) -> None:
        self.split_of: dict[int, str] = {}
        self.shard_of: dict[int, str] = {}
        self.keys: set[object] = set()
        self.rows_of: dict[str, int] = dict.fromkeys(SPLITS, 0)


def sample_key(stay: object, hadm: object, time: object, dicom: object) -> tuple[object, ...]:
    """A stay's key is (stay_id, time); an image's its dicom_id; an admission's (hadm_id, time)."""
    if stay is not None:
        return ("stay", stay, time)
    return ("image", dicom) if dicom is not None else ("admission", hadm, time)


def _unlisted(out: Path, manifest: Manifest) -> list[str]:
    listed = {file.name for file in manifest.files}
    there = {f"shards/{path.name}" for path in (out / "shards").glob("*.parquet")}
    return [f"{out / name}: not in the manifest; remove it" for name in sorted(there - listed)]


def _check_file(path: Path, sha256: str, rows: int) -> list[str]:
    if not path.is_file():
        return [f"{path}: missing; extract again"]
    if sha256_file(path) != sha256:
        return [f"{path}: altered since its manifest was written; extract again"]
    try:
        found = pq.read_metadata(path).num_rows
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        return [f"{path}: not readable as Parquet ({error}); extract again"]
    if found != rows:
        return [f"{path}: {found} rows, but the manifest says {rows}; extract again"]
    if not schema.equals(SHARD_SCHEMA):
        return [f"{path}: columns are not those of schema version {SCHEMA_VERSION}; extract again"]
    return []


def _check_shard(path: Path, first_row: int, manifest: Manifest, seen: _Seen) -> list[str]:
    problems: list[str] = []
    with pq.ParquetFile(path) as shard:
        for batch in shard.iter_batches(batch_size=1024):
            try:
                check_rows(batch, first_row, path, len(manifest.labels))
            except InputError as error:
                problems.append(str(error))
            problems += _check_labels(batch, first_row, path)
            problems += _check_subjects(batch, path, seen)
            first_row += batch.num_rows
    return problems


def _check_labels(batch: pa.RecordBatch, first_row: int, path: Path) -> list[str]:
    problems = []
    for column in ("labels", "cxr_labels"):
        values: NDArray[np.float32] = batch.column(column).flatten().to_numpy()
        wrong = ~((values == 0) | (values == 1))
        if wrong.any():
            problems.append(
                f"{path}: rows {first_row} to {first_row + batch.num_rows - 1}, column {column}: "
                f"{int(wrong.sum())} values are neither 0 nor 1; extract again"
            )
    return problems


def _check_subjects(batch: pa.RecordBatch, path: Path, seen: _Seen) -> list[str]:
    keyed = ["subject_id", "split", "stay_id", "hadm_id", "prediction_time", "dicom_id"]
    columns = [batch.column(name).to_pylist() for name in keyed]
    found: dict[str, list[int]] = {}
    for subject, split, stay, hadm, time, dicom in zip(*columns, strict=True):
        key = sample_key(stay, hadm, time, dicom)
        faults = {
            "in two splits": seen.split_of.setdefault(subject, split) != split,
            "in two shards": seen.shard_of.setdefault(subject, path.name) != path.name,
            "with a repeated sample key": key in seen.keys,
            f"in an unknown split {split!r}": split not in SPLITS,
        }
        seen.keys.add(key)
        if split in SPLITS:
            seen.rows_of[split] += 1
        for fault, present in faults.items():
            if present:
                found.setdefault(fault, []).append(subject)
    return [
        f"{path}: {len(subjects)} rows of subjects {fault} "
        f"(subject_id {', '.join(map(str, subjects[:_EXAMPLES]))}); extract again"
        for fault, subjects in found.items()
    ]
