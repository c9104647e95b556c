"""The raw tables of MIMIC-III and MIMIC-IV that tasks of admissions need: all labs, and notes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from data.errors import InputError
from data.sources import mimic3, mimic4
from data.sources.layout import TableSpec, same
from data.sources.notes import DISCHARGE, find_notes, read_notes
from data.sources.release import Release, find_table, require_columns

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from data.sources.notes import NoteFile

_PEOPLE = ("patients", "admissions", "diagnoses_icd")
_LABS_IV = "subject_id hadm_id charttime storetime value valuenum flag"
_LABS_III = "subject_id hadm_id charttime value valuenum flag"
LAB_TABLES = {
    "mimic-iv": TableSpec(
        table="labevents", into="labs", columns=same(_LABS_IV, item="itemid", unit="valueuom")
    ),
    "mimic-iii": TableSpec(
        table="labevents", into="labs", columns=same(_LABS_III, item="itemid", unit="valueuom")
    ),
}
LAB_NAMES = TableSpec(
    table="d_labitems", into="lab_names", columns=same("", item="itemid", name="label")
)


def admission_specs(release: Release) -> tuple[TableSpec, ...]:
    """The tables of a release that an admission's sample is made of, notes apart."""
    three = release.name.startswith("mimic-iii")
    people = [s for s in (mimic3 if three else mimic4).TABLES if s.table in _PEOPLE]
    return (*people, LAB_TABLES["mimic-iii" if three else "mimic-iv"], LAB_NAMES)


def open_admissions(release: Release) -> Release:
    """The release with the dictionary of tests, and every column that is needed.

    Raises:
        InputError: That table or a column (such as the flag of results) is missing.
    """
    tables = {**release.tables, "d_labitems": find_table(release.folder, "d_labitems")}
    for spec in admission_specs(release):
        require_columns(release.name, tables[spec.table], spec)
    return Release(release.name, release.folder, tables)


def discharge_file(folder: Path, release: str) -> NoteFile:
    """The table of discharge summaries in a folder of notes.

    Raises:
        InputError: There is none, or it belongs to the other database.
    """
    wanted = "noteevents" if release.startswith("mimic-iii") else "discharge"
    found = {file.table: file for file in find_notes(folder)}
    if wanted not in found:
        raise InputError(
            f"{folder}: no table {wanted} (found: {', '.join(found)}), which holds the discharge "
            f"summaries of {release}; give its folder as --notes"
        )
    return found[wanted]


def discharge_notes(file: NoteFile) -> Iterator[pl.DataFrame]:
    """The discharge summaries of a table of notes, streamed."""
    for frame in read_notes(file):
        yield frame.filter(pl.col("category") == DISCHARGE)
