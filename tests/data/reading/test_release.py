"""Telling releases apart, and saying what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from data.errors import InputError
from data.sources.release import open_release

if TYPE_CHECKING:
    from collections.abc import Callable

DEMO = Path(__file__).parents[3] / "data" / "demo"


def _rename_column(path: Path, old: bytes, new: bytes) -> None:
    head, _, body = path.read_bytes().partition(b"\n")
    path.write_bytes(head.replace(old, new) + b"\n" + body)


def test_the_real_demos() -> None:
    assert open_release(DEMO / "mimic-iv").name == "mimic-iv-2.2"
    assert open_release(DEMO / "mimic-iii").name == "mimic-iii-1.4"


@pytest.mark.parametrize(
    ("where", "text", "version"),
    [
        ("README.md", "# MIMIC-IV (version 3.1)\n", "3.1"),
        ("CHANGELOG.txt", "The latest version of MIMIC-IV is v2.2.\n", "2.2"),
    ],
)
def test_the_folder_says_its_version(
    tmp_path: Path, make_hospital: Callable[..., Path], where: str, text: str, version: str
) -> None:
    folder = make_hospital(tmp_path, patients=2, form="csv")
    (folder / where).write_text(text)
    assert open_release(folder).name == f"mimic-iv-{version}"


def test_the_folders_name_says_its_version(
    tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    assert open_release(make_hospital(tmp_path / "mimiciv" / "3.1")).name == "mimic-iv-3.1"
    assert open_release(make_hospital(tmp_path / "mimic-iv-2.2")).name == "mimic-iv-2.2"


def test_tables_alone_tell_2_from_3_and_1(
    tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    def newer(tables: dict) -> None:
        tables["patients"][0]["anchor_year_group"] = "2020 - 2022"

    assert open_release(make_hospital(tmp_path / "a")).name == "mimic-iv-2.x"
    assert open_release(make_hospital(tmp_path / "b", edit=newer)).name == "mimic-iv-3.x"
    old = make_hospital(tmp_path / "c", form="csv")
    (old / "core").mkdir()
    for name in ("patients", "admissions"):
        shutil.move(old / "hosp" / f"{name}.csv", old / "core" / f"{name}.csv")
    _rename_column(old / "core" / "admissions.csv", b"race", b"ethnicity")
    assert open_release(old).name == "mimic-iv-1.0"


@pytest.mark.parametrize("form", ["csv", "csv.gz", "parquet"])
@pytest.mark.parametrize("upper", [False, True])
def test_any_form_and_case(
    tmp_path: Path, make_hospital: Callable[..., Path], form: str, upper: bool
) -> None:
    release = open_release(make_hospital(tmp_path, form=form, upper=upper, patients=2))
    assert {spec.table for spec in release.specs} == set(release.tables)


def test_a_missing_table_is_named(tmp_path: Path, make_hospital: Callable[..., Path]) -> None:
    folder = make_hospital(tmp_path, patients=2)
    (folder / "hosp" / "labevents.csv.gz").rename(folder / "hosp" / "labevent.csv.gz")
    with pytest.raises(InputError, match=r"mimic-iv table labevents is missing.*found: labevent"):
        open_release(folder)


def test_a_renamed_column_is_named_with_its_like(
    tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    folder = make_hospital(tmp_path, patients=2, form="csv")
    _rename_column(folder / "icu" / "chartevents.csv", b"charttime", b"chart_time")
    with pytest.raises(
        InputError,
        match=r"chartevents\.csv: mimic-iv-2\.x: column charttime is missing.*close: chart_time",
    ):
        open_release(folder)


def test_race_and_ethnicity_are_one_column(
    tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    folder = make_hospital(tmp_path, patients=2, form="csv")
    _rename_column(folder / "hosp" / "admissions.csv", b"race", b"skin")
    with pytest.raises(InputError, match="column race or ethnicity is missing"):
        open_release(folder)


def test_another_separator_is_named(tmp_path: Path, make_hospital: Callable[..., Path]) -> None:
    folder = make_hospital(tmp_path, patients=2, form="csv")
    path = folder / "hosp" / "patients.csv"
    path.write_bytes(path.read_bytes().replace(b",", b";"))
    with pytest.raises(InputError, match=r"patients\.csv: columns are separated by ';'"):
        open_release(folder)


def test_a_repeated_column_is_named(tmp_path: Path, make_hospital: Callable[..., Path]) -> None:
    folder = make_hospital(tmp_path, patients=2, form="csv")
    _rename_column(folder / "hosp" / "patients.csv", b"gender", b"DOD")
    with pytest.raises(InputError, match="column dod appears twice"):
        open_release(folder)


def test_no_folder_no_tables_no_stay_id(tmp_path: Path, make_hospital: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="no such folder"):
        open_release(tmp_path / "absent")
    with pytest.raises(InputError, match="icustays is missing"):
        open_release(tmp_path)
    folder = make_hospital(tmp_path / "h", patients=2, form="csv")
    _rename_column(folder / "icu" / "icustays.csv", b"stay_id", b"stay")
    with pytest.raises(InputError, match="neither stay_id"):
        open_release(folder)


def test_damaged_parquet_is_named(tmp_path: Path, make_hospital: Callable[..., Path]) -> None:
    folder = make_hospital(tmp_path, patients=2, form="parquet")
    path = folder / "icu" / "chartevents.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"chartevents\.parquet: not readable as Parquet"):
        open_release(folder)


def test_the_fingerprint_follows_content_not_place(
    tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    def other(tables: dict) -> None:
        tables["chartevents"][0]["value"] = "9" * len(tables["chartevents"][0]["value"])

    first = open_release(make_hospital(tmp_path / "a")).fingerprint
    assert open_release(make_hospital(tmp_path / "b")).fingerprint == first
    assert open_release(make_hospital(tmp_path / "c", edit=other)).fingerprint != first
