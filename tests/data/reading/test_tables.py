"""Typed frames equal a literal reading with the csv module, and faults name their row."""

from __future__ import annotations

import csv
import gzip
from datetime import datetime
from typing import TYPE_CHECKING

import polars as pl
import pytest

from data.errors import InputError
from data.events import item_ids
from data.sources.canonical import TABLES
from data.sources.release import Release, open_release
from data.sources.tables import TableReader, read_whole, refuse_repeated_keys

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STAMP = "%Y-%m-%d %H:%M:%S"


def _reader(release: Release, table: str, **options: object) -> TableReader:
    spec = next(spec for spec in release.specs if spec.table == table)
    if spec.source is not None:
        options.setdefault("items", item_ids(release.name, spec.source))
    return TableReader(release.tables[table], spec, **options)  # type: ignore[arg-type]


def _literal_chart_rows(path: Path) -> list[dict[str, object]]:
    """Row by row, as the tables are documented."""
    items = item_ids("mimic-iv-2.2", "chart")
    found = []
    with gzip.open(path, "rt", newline="") as handle:
        for number, row in enumerate(csv.DictReader(handle), 1):
            if int(row["itemid"]) not in items:
                continue
            found.append(
                {
                    "source": "chart",
                    "row": number,
                    "subject_id": int(row["subject_id"]),
                    "hadm_id": int(row["hadm_id"]),
                    "stay_id": int(row["stay_id"]) if row["stay_id"] else None,
                    "itemid": int(row["itemid"]),
                    "charttime": datetime.strptime(row["charttime"], STAMP),  # noqa: DTZ007
                    "storetime": datetime.strptime(row["storetime"], STAMP)  # noqa: DTZ007
                    if row["storetime"]
                    else None,
                    "value": row["value"] or None,
                    "valuenum": float(row["valuenum"]) if row["valuenum"] else None,
                    "valueuom": row["valueuom"] or None,
                    "error": None,
                }
            )
    return found


def test_chart_events_equal_a_literal_reading(
    tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    def blanks(tables: dict) -> None:
        tables["chartevents"][3]["stay_id"] = ""
        tables["chartevents"][5]["storetime"] = ""

    release = open_release(make_hospital(tmp_path, edit=blanks))
    frame = read_whole(_reader(release, "chartevents"))
    assert frame.rows(named=True) == _literal_chart_rows(release.tables["chartevents"].path)
    assert dict(frame.schema) == TABLES["events"]


@pytest.mark.parametrize("table", ["chartevents", "admissions", "patients"])
def test_block_size_and_form_change_nothing(
    tmp_path: Path, make_hospital: Callable[..., Path], table: str
) -> None:
    whole = None
    for form, upper in (("csv.gz", False), ("csv", True), ("parquet", False), ("parquet", True)):
        release = open_release(make_hospital(tmp_path / f"{form}{upper}", form=form, upper=upper))
        for block_bytes in (1_000, 50_000, 1 << 25):
            frame = read_whole(_reader(release, table, block_bytes=block_bytes))
            whole = frame if whole is None else whole
            assert frame.equals(whole)


def test_none_is_a_value_and_only_the_empty_field_is_null(
    tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    def words(tables: dict) -> None:
        for row, word in zip(
            tables["chartevents"], ("None", "NA", "null", "nan", ""), strict=False
        ):
            row |= {"itemid": "220739", "value": word}

    release = open_release(make_hospital(tmp_path, patients=1, edit=words))
    frame = read_whole(_reader(release, "chartevents"))
    assert frame["value"].head(5).to_list() == ["None", "NA", "null", "nan", None]


def test_carriage_returns_and_ids_with_a_decimal_point(
    tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    folder = make_hospital(tmp_path, patients=2, form="csv")
    expected = read_whole(_reader(open_release(folder), "chartevents"))
    path = folder / "icu" / "chartevents.csv"
    content = path.read_bytes().replace(b"\n", b"\r\n").replace(b",30001,", b",30001.0,")
    path.write_bytes(content)
    assert read_whole(_reader(open_release(folder), "chartevents")).equals(expected)


def test_subjects_and_items_are_filtered_and_rows_counted(
    tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    release = open_release(make_hospital(tmp_path))
    reader = _reader(release, "chartevents", subjects=pl.Series([10_002, 10_005]))
    frame = read_whole(reader)
    assert set(frame["subject_id"]) == {10_002, 10_005}
    assert 224_015 not in set(frame["itemid"])
    with gzip.open(release.tables["chartevents"].path, "rt") as handle:
        assert reader.rows == sum(1 for _ in csv.DictReader(handle))


def test_text_in_valuenum_is_null_and_counted(
    tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    def words(tables: dict) -> None:
        tables["chartevents"][0]["valuenum"] = ">100"
        tables["chartevents"][1]["valuenum"] = "N/A"

    reader = _reader(open_release(make_hospital(tmp_path, patients=1, edit=words)), "chartevents")
    frame = read_whole(reader)
    assert frame["valuenum"].head(3).is_null().to_list() == [True, True, False]
    assert reader.repairs == {"chartevents: valuenum is no number": 2}


@pytest.mark.parametrize(
    ("table", "column", "value", "message"),
    [
        ("chartevents", "charttime", "2150-13-01 00:00:00", r"row 8: column charttime holds '2150"),
        ("chartevents", "storetime", "yesterday", "row 8: column storetime holds 'yesterday'"),
        ("chartevents", "itemid", "22O045", "row 8: column itemid holds '22O045'"),
        ("chartevents", "stay_id", "abc", "row 8: column stay_id holds 'abc'"),
        ("icustays", "intime", "31/12/2150", "row 8: column intime holds '31/12/2150'"),
        ("icustays", "los", "long", "row 8: column los holds 'long'"),
        ("patients", "anchor_age", "4x", "row 8: column anchor_age holds '4x'"),
    ],
)
@pytest.mark.parametrize("block_bytes", [400, 1 << 25])
def test_an_unreadable_value_names_file_row_and_column(
    tmp_path: Path,
    make_hospital: Callable[..., Path],
    table: str,
    column: str,
    value: str,
    message: str,
    block_bytes: int,
) -> None:
    def spoil(tables: dict) -> None:
        tables[table][7] |= {column: value}

    release = open_release(make_hospital(tmp_path, edit=spoil))
    with pytest.raises(InputError, match=message) as caught:
        read_whole(_reader(release, table, block_bytes=block_bytes))
    assert f"{table}.csv.gz" in str(caught.value)


def test_an_unreadable_time_in_parquet_is_named(
    tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    folder = make_hospital(tmp_path, form="parquet", patients=2)
    path = folder / "icu" / "chartevents.parquet"
    frame = pl.read_parquet(path).with_columns(pl.col("charttime").cast(pl.String))
    times = ["soon" if row == 3 else time for row, time in enumerate(frame["charttime"])]
    frame.with_columns(pl.Series("charttime", times)).write_parquet(path)
    with pytest.raises(InputError, match=r"chartevents\.parquet: row 4: column charttime .*'soon'"):
        read_whole(_reader(open_release(folder), "chartevents"))


@pytest.mark.parametrize("block_bytes", [500, 1 << 25])
def test_bytes_that_are_not_utf8_name_their_line(
    tmp_path: Path, make_hospital: Callable[..., Path], block_bytes: int
) -> None:
    folder = make_hospital(tmp_path, patients=2, form="csv")
    path = folder / "icu" / "chartevents.csv"
    lines = path.read_bytes().split(b"\n")
    target = next(i for i, line in enumerate(lines) if i > 40 and b",None," in line)
    lines[target] = lines[target].replace(b",None,", b",N\xf6ne,")
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match=f"line {target + 1} is not UTF-8 text .byte 0xf6"):
        read_whole(_reader(open_release(folder), "chartevents", block_bytes=block_bytes))


def test_a_field_too_many_names_its_line(
    tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    folder = make_hospital(tmp_path, patients=2, form="csv")
    path = folder / "icu" / "chartevents.csv"
    lines = path.read_bytes().split(b"\n")
    lines[30] += b",more"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match=r"chartevents\.csv: line 31 has 10 fields.*header 9"):
        read_whole(_reader(open_release(folder), "chartevents"))


@pytest.mark.parametrize("table", ["chartevents", "admissions"])
@pytest.mark.parametrize("block_bytes", [500, 1 << 25])
def test_a_line_that_lacks_fields_names_its_line_and_a_blank_one_does_not(
    tmp_path: Path, make_hospital: Callable[..., Path], table: str, block_bytes: int
) -> None:
    """Admissions have quoted commas and line ends before the cut."""
    folder = make_hospital(tmp_path, patients=9, form="csv")
    path = next(folder.rglob(f"{table}.csv"))
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:15], b"", *lines[15:]]))
    read_whole(_reader(open_release(folder), table, block_bytes=block_bytes))
    at, end, left = (13, 15, 5) if table == "admissions" else (30, 31, 7)
    lines[at] = lines[at].split(b",", 2)[2]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match=rf"{table}\.csv: line {end} has {left} fields.*copy the"):
        read_whole(_reader(open_release(folder), table, block_bytes=block_bytes))


def test_different_rows_of_one_key_are_refused_identical_ones_are_not(
    tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    def twice(tables: dict) -> None:
        tables["icustays"].append(dict(tables["icustays"][0]))
        tables["patients"].append({**tables["patients"][2], "gender": "?"})

    release = open_release(make_hospital(tmp_path, patients=4, edit=twice))
    stays = read_whole(_reader(release, "icustays"))
    refuse_repeated_keys(stays, release.tables["icustays"], "stay_id")
    patients = read_whole(_reader(release, "patients"))
    with pytest.raises(InputError, match=r"patients\.csv\.gz: rows 3, 5: .*subject_id 10003"):
        refuse_repeated_keys(patients, release.tables["patients"], "subject_id")


def test_the_reader_never_holds_more_than_blocks(
    tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    release = open_release(make_hospital(tmp_path, patients=40))
    frames = list(_reader(release, "chartevents", block_bytes=20_000).frames())
    heights = [frame.height for frame in frames]
    assert len(heights) > 10
    assert max(heights) < 1000
