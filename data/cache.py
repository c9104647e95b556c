"""The row cache: all shards of a cohort in one Arrow file on local disk, checked while it is made.

Built once a node, named by the manifest's digest. What enters it has passed every check of
`checked_batches`, so a reader of the cache needs none.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import InputError
from data.files import PRIVATE, atomic_path, sha256_file, write_json
from data.row_checks import check_rows
from data.schema import SHARD_SCHEMA

if TYPE_CHECKING:
    from collections.abc import Iterator

    from data.manifest import Manifest, ShardFile

logger = logging.getLogger(__name__)

CACHE_ROWS = 512


def default_folder() -> Path:
    """Where caches lie if no cache_dir is given: a folder of this user's alone in the temp folder.

    Raises:
        InputError: Someone else made that folder.
    """
    own = Path(tempfile.gettempdir()) / f"rayfuse-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    if own.stat().st_uid != os.getuid():
        raise InputError(f"{own}: belongs to another user; set data.batches.cache_dir")
    own.chmod(0o700)
    return own / "rows"


def folder_of(cache_dir: Path | None) -> Path:
    """Where a run's caches lie: `data.batches.cache_dir`, or the default.

    Raises:
        InputError: See `default_folder`.
    """
    return cache_dir or default_folder()


def ensure(folder: Path, manifest: Manifest, cache_dir: Path | None) -> Path:
    """The cache file of a shard folder, built if absent, by one process of the node at a time.

    Raises:
        InputError: A shard is missing, was altered after its manifest, or holds a row that a
            reader must refuse; or the disk of the cache is full.
    """
    cache_dir = folder_of(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = cache_dir / f"{manifest.digest[:32]}.arrow"
    with _locked(path.with_suffix(".lock")):
        if path.is_file():
            _verify(folder, manifest, path.with_suffix(".json"))
            return path
        try:
            _build(folder, manifest, path)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            size = sum((folder / file.name).stat().st_size for file in manifest.files)
            raise InputError(
                f"{cache_dir}: disk full while caching {size / 1e9:.1f} GB of shards; "
                "free space there, or set data.batches.cache_dir to another disk"
            ) from None
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(folder: Path, manifest: Manifest, path: Path) -> None:
    logger.info("caching %d rows of %s in %s", manifest.rows, folder, path.parent)
    stamps = {}
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, SHARD_SCHEMA) as out,
    ):
        temporary.chmod(PRIVATE)
        first = 0
        for file in manifest.files:
            stamps[file.name] = _check_hash(folder, file)
            for batch in checked_batches(folder, manifest, file, first):
                out.write_batch(batch)
            first += file.rows
    write_json(path.with_suffix(".json"), {str(folder.resolve()): stamps})


def checked_batches(
    folder: Path, manifest: Manifest, file: ShardFile, first_row: int
) -> Iterator[pa.RecordBatch]:
    """The rows of one shard in pieces, every row checked.

    Raises:
        InputError: The shard has other columns or another number of rows than it should, or
            `check_rows` refuses a row.
    """
    place = folder / file.name
    try:
        shard = pq.ParquetFile(place)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{place}: not a readable Parquet file ({error}); extract again") from None
    found = shard.schema_arrow
    for field in SHARD_SCHEMA:
        index = found.get_field_index(field.name)
        if index < 0 or not _same_type(found.field(index).type, field.type):
            what = "missing" if index < 0 else f"of type {found.field(index).type}"
            raise InputError(
                f"{place}: column {field.name} is {what}, expected {field.type}; extract again"
            )
    if shard.metadata.num_rows != file.rows:
        raise InputError(
            f"{place}: {shard.metadata.num_rows} rows, but the manifest says {file.rows}; "
            "extract again"
        )
    for piece in shard.iter_batches(batch_size=CACHE_ROWS, columns=SHARD_SCHEMA.names):
        batch = pa.RecordBatch.from_arrays(
            [piece.column(field.name).cast(field.type) for field in SHARD_SCHEMA],
            schema=SHARD_SCHEMA,
        )
        check_rows(batch, first_row, place, len(manifest.labels))
        first_row += batch.num_rows
        yield batch


def _same_type(found: pa.DataType, expected: pa.DataType) -> bool:
    if pa.types.is_list(expected):
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
        return is_list and _same_type(found.value_type, expected.value_type)
    if pa.types.is_string(expected) or pa.types.is_large_string(expected):
        return pa.types.is_string(found) or pa.types.is_large_string(found)
    if pa.types.is_binary(expected):
        return pa.types.is_binary(found) or pa.types.is_large_binary(found)
    return found == expected


def _check_hash(folder: Path, file: ShardFile) -> list[int]:
    """Compare a shard with its manifest; gives the size and time at which it was found right."""
    path = folder / file.name
    if not path.is_file():
        raise InputError(f"{path}: missing, but the manifest lists it; extract again")
    state = path.stat()
    if sha256_file(path) != file.sha256:
        raise InputError(
            f"{path}: altered after its manifest was written (other sha256); extract again"
        )
    return [state.st_size, state.st_mtime_ns]


def open_cache(path: Path) -> pa.RecordBatchFileReader:
    """The cache, memory-mapped.

    Raises:
        InputError: The file is damaged.
    """
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: damaged row cache ({error}); delete it") from None


def _verify(folder: Path, manifest: Manifest, stamps_path: Path) -> None:
    """Hash again only the shards whose size or time is not that of their last check."""
    known = json.loads(stamps_path.read_text()) if stamps_path.is_file() else {}
    key = str(folder.resolve())
    stamps = known.get(key, {})
    fresh = dict(stamps)
    for file in manifest.files:
        path = folder / file.name
        state = path.stat() if path.is_file() else None
        if state is None or stamps.get(file.name) != [state.st_size, state.st_mtime_ns]:
            fresh[file.name] = _check_hash(folder, file)
    if fresh != stamps:
        write_json(stamps_path, {**known, key: fresh})
