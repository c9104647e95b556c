"""Raw tables of admissions, notes and MEDS rows into the partitions of one extraction."""

from __future__ import annotations

import json
import logging
import shutil
from typing import TYPE_CHECKING

from data.files import sha256_json, write_json
from data.sources.clinical import admission_specs, discharge_notes
from data.sources.meds import given_splits, lab_names, meds_rows
from data.stage import Stage, StagedTable, ingest_table, write_partitions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import polars as pl

    from data.sources.meds import Meds
    from data.sources.notes import NoteFile
    from data.sources.release import Release
    from data.switches import MedsCodes

logger = logging.getLogger(__name__)


def ingest_admissions(
    release: Release, notes: NoteFile | None, folder: Path, partitions: int
) -> Stage:
    """Write what an admission's sample needs by partition; finished tables are kept.

    Args:
        release: Of `data.sources.clinical.open_admissions`.
        notes: The table of discharge summaries, if one was given.
        folder: The extraction's scratch, which is removed at its end.
        partitions: Number of subject partitions.

    Raises:
        InputError: A fault of the raw tables.
    """
    tables = [
        ingest_table(release, spec, folder, partitions, None) for spec in admission_specs(release)
    ]
    if notes is not None:
        tables.append(_written(folder, "notes", discharge_notes(notes), partitions))
    return _stage(release.name, tables, partitions)


def ingest_meds(source: Meds, codes: MedsCodes, folder: Path, partitions: int) -> Stage:
    """Write the needed rows of a MEDS dataset by partition; finished tables are kept.

    Raises:
        InputError: A fault of the dataset.
    """
    tables = [
        _written(folder, "meds", meds_rows(source, codes), partitions),
        _written(folder, "lab_names", iter([lab_names(source, codes)]), None),
        _written(folder, "given_splits", iter([given_splits(source)]), partitions),
    ]
    return _stage(source.name, tables, partitions)


def _written(
    folder: Path, name: str, frames: Iterator[pl.DataFrame], partitions: int | None
) -> StagedTable:
    record = folder / "records" / f"table-{name}.json"
    if record.is_file():
        logger.info("%s: already read", name)
        return StagedTable.model_validate(json.loads(record.read_text(encoding="utf-8")))
    target = folder / "tables" / name
    shutil.rmtree(target, ignore_errors=True)
    files = tuple(write_partitions(frames, target, folder, name, partitions))
    rows = sum(file.rows for file in files)
    table = StagedTable(table=name, rows_read=rows, rows_kept=rows, repairs={}, files=files)
    write_json(record, table.model_dump(mode="json"))
    logger.info("read %s: %d rows", name, rows)
    return table


def _stage(release: str, tables: list[StagedTable], partitions: int) -> Stage:
    return Stage(
        release=release,
        fingerprint="",
        items=sha256_json([]),
        partitions=partitions,
        tables=tuple(tables),
    )
