"""Raw tables to typed Parquet by subject partition, once per release.

One pass over each raw file, keeping the columns and items of the benchmark. `rayfuse data stage`
keeps the result; an extraction from raw tables makes the same files in its scratch and removes
them, so that both ways lead through one path.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from data.config import Config
from data.errors import InputError
from data.estimate import choose_partitions
from data.events import item_ids
from data.files import atomic_path, sha256_file, sha256_json, write_json
from data.sources.canonical import TABLES
from data.sources.release import open_release
from data.sources.tables import TableReader, read_whole, refuse_repeated_keys

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from data.sources.layout import TableSpec
    from data.sources.release import Release

logger = logging.getLogger(__name__)

STAGE_FILE: Final = "stage.json"
STAGE_VERSION: Final = 1
_FLUSH_ROWS: Final = 1 << 20
_WHOLE: Final = ("patients", "admissions", "icustays")
_UNPARTITIONED: Final = ("icd_dictionary", "lab_names")


class StagedFile(Config):
    """One Parquet file of one table."""

    name: str
    """Relative to the staged folder."""
    into: str
    """The canonical table."""
    partition: int | None
    """Its subjects' partition; None for a table without subjects."""
    rows: int
    sha256: str


class StagedTable(Config):
    """One raw table after its pass."""

    table: str
    rows_read: int
    rows_kept: int
    repairs: dict[str, int]
    files: tuple[StagedFile, ...]


class Stage(Config):
    """What a staged folder holds; written last."""

    stage_version: int = STAGE_VERSION
    release: str
    fingerprint: str
    """Of the raw tables it was made from."""
    items: str
    """Hash of the item ids that were kept."""
    partitions: int
    tables: tuple[StagedTable, ...]

    def files_of(self, partition: int) -> list[StagedFile]:
        """The files that hold a partition, and those that every partition needs."""
        return [
            file
            for table in self.tables
            for file in table.files
            if file.partition is None or file.partition == partition
        ]


def stage(folder: Path, out: Path, *, partitions: int = 0) -> Stage:
    """Stage a raw release into `out`; a killed run continues with the tables that are missing.

    Args:
        folder: Raw MIMIC-III or MIMIC-IV.
        out: A folder that does not exist yet, or a finished one of the same release.
        partitions: Number of subject partitions; 0 chooses from the file sizes.

    Raises:
        InputError: A fault of the raw tables, or `out` holds something else.
    """
    release = open_release(folder)
    partitions = partitions or choose_partitions(event_files(release))
    key = sha256_json([release.name, release.fingerprint, items_hash(release.name), partitions])
    if out.exists() and any(out.iterdir()):
        return _finished(out, release, partitions)
    work = work_folder(out, key)
    with named_full_disk(out):
        staged = ingest(release, work, partitions)
        write_json(work / STAGE_FILE, staged.model_dump(mode="json"))
    shutil.rmtree(work / "records")
    publish(work, out)
    return staged


def _finished(out: Path, release: Release, partitions: int) -> Stage:
    staged = load_stage(out)
    there = (staged.release, staged.fingerprint, staged.partitions)
    if there != (release.name, release.fingerprint, partitions):
        raise InputError(
            f"{out}: holds {staged.release} staged from other files or in {staged.partitions} "
            "partitions; choose another --out or remove that folder"
        )
    logger.info("%s: already staged", out)
    return staged


def load_stage(folder: Path) -> Stage:
    """The description of a staged folder.

    Raises:
        InputError: None is there, or it is of another version or other items than this code needs.
    """
    path = folder / STAGE_FILE
    if not path.is_file():
        raise InputError(f"{folder}: no {STAGE_FILE}, so not a staged folder; choose another")
    value = json.loads(path.read_text(encoding="utf-8"))
    if value.get("stage_version") != STAGE_VERSION:
        raise InputError(f"{path}: of another version of rayfuse; run `rayfuse data stage` again")
    staged = Stage.model_validate(value)
    if staged.items != items_hash(staged.release):
        raise InputError(
            f"{folder}: staged with another list of item ids; run `rayfuse data stage` again"
        )
    return staged


def is_staged(folder: Path) -> bool:
    """Whether the folder was written by `rayfuse data stage`."""
    return (folder / STAGE_FILE).is_file()


def items_hash(release: str) -> str:
    """A hash of the item ids that a release is filtered by."""
    return sha256_json(sorted(item_ids(release)))


def event_files(release: Release) -> dict[str, Path]:
    """The files of the event tables by name."""
    return {spec.table: release.tables[spec.table].path for spec in release.specs if spec.source}


def work_folder(out: Path, key: str) -> Path:
    """Where unfinished output lies: a hidden sibling of `out`, named by what it is made from."""
    folder = out.parent / f".{out.name}.{key[:12]}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for other in out.parent.glob(f".{out.name}.*.partial"):
        if other != folder:
            logger.info("%s: unfinished work of other settings; remove it if not needed", other)
    return folder


@contextmanager
def named_full_disk(out: Path) -> Iterator[None]:
    """Turn a full disk into a message for the user; what was finished is kept.

    Raises:
        InputError: Something could not be written for want of space.
    """
    try:
        yield
    except (OSError, pl.exceptions.PolarsError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise InputError(
                f"{out}: the disk is full; free space there (`rayfuse data plan` says how much), "
                "then the same command continues"
            ) from None
        raise


def publish(work: Path, out: Path) -> None:
    """Rename the finished work to its name."""
    os.replace(work, out)


def ingest(release: Release, folder: Path, partitions: int) -> Stage:
    """Write every table of a release into `folder` by partition; finished tables are kept.

    Raises:
        InputError: A fault of the raw tables.
    """
    whole = [spec for spec in release.specs if spec.table in _WHOLE]
    rest = [spec for spec in release.specs if spec.table not in _WHOLE]
    tables = [ingest_table(release, spec, folder, partitions, None) for spec in whole]
    stays = next(table for table in tables if table.table == "icustays")
    subjects = _subjects(folder, stays)
    threads = max(1, min(3, (os.cpu_count() or 1) // 4))
    with ThreadPoolExecutor(threads) as pool:
        passes = [
            pool.submit(ingest_table, release, spec, folder, partitions, subjects) for spec in rest
        ]
        try:
            tables += [one.result() for one in passes]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return Stage(
        release=release.name,
        fingerprint=release.fingerprint,
        items=items_hash(release.name),
        partitions=partitions,
        tables=tuple(tables),
    )


def _subjects(folder: Path, stays: StagedTable) -> pl.Series:
    frames = [pl.read_parquet(folder / file.name, columns=["subject_id"]) for file in stays.files]
    empty = pl.DataFrame(schema={"subject_id": pl.Int64})
    return pl.concat([empty, *frames])["subject_id"].unique().sort()


def ingest_table(
    release: Release, spec: TableSpec, folder: Path, partitions: int, subjects: pl.Series | None
) -> StagedTable:
    """One pass over a raw table of a release; a finished one is kept.

    Raises:
        InputError: A fault of the table.
    """
    record = folder / "records" / f"table-{spec.table}.json"
    if record.is_file():
        logger.info("%s: already read", spec.table)
        return StagedTable.model_validate_json(record.read_text(encoding="utf-8"))
    file = release.tables[spec.table]
    logger.info("reading %s (%.1f MB)", spec.table, file.path.stat().st_size / 1e6)
    items = item_ids(release.name, spec.source) if spec.source else None
    reader = TableReader(file, spec, items=items, subjects=_filter_of(spec, subjects))
    if spec.table in _WHOLE:
        frame = read_whole(reader)
        if spec.key is not None:
            refuse_repeated_keys(frame, file, spec.key)
        frames = iter([frame])
    else:
        frames = reader.frames()
    target = folder / "tables" / spec.table
    shutil.rmtree(target, ignore_errors=True)
    parts = None if spec.into in _UNPARTITIONED else partitions
    files = tuple(write_partitions(frames, target, folder, spec.into, parts))
    table = StagedTable(
        table=spec.table,
        rows_read=reader.rows,
        rows_kept=sum(part.rows for part in files),
        repairs=reader.repairs,
        files=files,
    )
    write_json(record, table.model_dump(mode="json"))
    logger.info("read %s: kept %d of %d rows", spec.table, table.rows_kept, table.rows_read)
    return table


def _filter_of(spec: TableSpec, subjects: pl.Series | None) -> pl.Series | None:
    return subjects if "subject_id" in spec.columns else None


def write_partitions(
    frames: Iterator[pl.DataFrame], target: Path, root: Path, into: str, partitions: int | None
) -> Iterator[StagedFile]:
    """Write canonical frames into Parquet files by the hash of subject_id.

    Rows keep their order within a partition. At most about a million rows are held.

    Args:
        frames: Canonical frames.
        target: Folder of the table's files.
        root: Folder that names are relative to.
        into: The canonical table.
        partitions: Their number; None writes all rows together.
    """
    held: list[pl.DataFrame] = []
    rows, flush = 0, 0
    for frame in frames:
        if frame.height:
            held.append(frame)
            rows += frame.height
        if rows >= _FLUSH_ROWS:
            yield from _flush(pl.concat(held), target, root, (into, partitions, flush))
            held, rows, flush = [], 0, flush + 1
    if held:
        yield from _flush(pl.concat(held), target, root, (into, partitions, flush))


def _flush(
    frame: pl.DataFrame, target: Path, root: Path, place: tuple[str, int | None, int]
) -> Iterator[StagedFile]:
    into, partitions, flush = place
    if partitions is None:
        yield _write(frame, target / f"all-{flush:05d}.parquet", root, (into, None))
        return
    if partitions == 1:
        groups = {0: frame}
    else:
        number = partition_of(frame["subject_id"].to_numpy(), partitions)
        split = frame.with_columns(pl.Series("__part", number)).partition_by(
            "__part", as_dict=True, include_key=False, maintain_order=True
        )
        groups = {int(key[0]): part for key, part in split.items()}
    for part in sorted(groups):
        path = target / f"part-{part:05d}-{flush:05d}.parquet"
        yield _write(groups[part], path, root, (into, part))


def _write(
    frame: pl.DataFrame, path: Path, root: Path, place: tuple[str, int | None]
) -> StagedFile:
    with atomic_path(path) as temporary:
        frame.write_parquet(temporary, compression="zstd", compression_level=1, statistics=False)
    return StagedFile(
        name=path.relative_to(root).as_posix(),
        into=place[0],
        partition=place[1],
        rows=frame.height,
        sha256=sha256_file(path),
    )


def partition_of(subject_ids: np.ndarray, partitions: int) -> np.ndarray:
    """The partition of each subject: splitmix64 of the id, modulo their number; int64 [N]."""
    mixed = subject_ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed % np.uint64(partitions)).astype(np.int64)


def load_tables(folder: Path, files: Sequence[StagedFile]) -> dict[str, pl.DataFrame]:
    """The canonical tables that these files hold; a table without a file is empty.

    Raises:
        InputError: A file was altered after it was staged.
    """
    frames = {name: [pl.DataFrame(schema=schema)] for name, schema in TABLES.items()}
    for file in files:
        path = folder / file.name
        if not path.is_file() or sha256_file(path) != file.sha256:
            raise InputError(
                f"{path}: altered or missing since it was staged; run `rayfuse data stage` again"
            )
        frames[file.into].append(pl.read_parquet(path))
    return {name: pl.concat(parts) for name, parts in frames.items()}
