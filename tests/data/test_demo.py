"""The shipped demos are what their READMEs say."""

from __future__ import annotations

import gzip
import re
from importlib import resources
from pathlib import Path

import polars as pl
import pytest

from data.demo.cut import COLUMNS, cut

DEMO = Path(str(resources.files("data"))) / "demo"
ITEMS = pl.read_csv(
    Path(str(resources.files("data"))) / "resources" / "items.csv", comment_prefix="#"
)["itemid"]


def read(release: str, name: str) -> pl.DataFrame:
    return pl.read_csv(DEMO / release / f"{name}.csv.gz", infer_schema_length=None)


@pytest.mark.parametrize("release", ["mimic-iv", "mimic-iii"])
def test_tables_columns_and_licence(release):
    for name, columns in COLUMNS[release].items():
        assert read(release, name).columns == columns.split()
    readme = (DEMO / release / "README.md").read_text()
    assert "Open Database License" in readme
    assert re.search(r"https://doi\.org/10\.13026/\S+", readme)
    (licence,) = (DEMO / release).glob("LICENSE*")
    assert "Open Database License" in licence.read_text()
    assert sum(path.stat().st_size for path in (DEMO / release).rglob("*.gz")) < 3_000_000


@pytest.mark.parametrize(
    ("release", "name", "rows", "key"),
    [
        ("mimic-iv", "hosp/patients", 100, "subject_id"),
        ("mimic-iv", "icu/icustays", 140, "stay_id"),
        ("mimic-iv", "icu/chartevents", 110_209, None),
        ("mimic-iv", "hosp/labevents", 4_851, "labevent_id"),
        ("mimic-iii", "PATIENTS", 100, "subject_id"),
        ("mimic-iii", "ICUSTAYS", 136, "icustay_id"),
        ("mimic-iii", "CHARTEVENTS", 126_398, "row_id"),
        ("mimic-iii", "LABEVENTS", 4_569, "row_id"),
    ],
)
def test_rows(release, name, rows, key):
    table = read(release, name)
    assert table.height == rows
    if key:
        assert table[key].n_unique() == rows
    readme = (DEMO / release / "README.md").read_text()
    assert f"{rows:,}" in readme


def test_only_items_of_the_map_and_only_open_patients():
    for release, tables, patients in (
        ("mimic-iv", ("icu/chartevents", "hosp/labevents", "icu/icustays"), "hosp/patients"),
        ("mimic-iii", ("CHARTEVENTS", "LABEVENTS", "ICUSTAYS"), "PATIENTS"),
    ):
        known = set(read(release, patients)["subject_id"])
        for name in tables:
            table = read(release, name)
            assert set(table["subject_id"]) <= known
            if "itemid" in table.columns:
                assert set(table["itemid"]) <= set(ITEMS)


def test_the_traps_of_the_real_tables_are_in_it():
    """What the tests of the extraction rely on: see the READMEs."""
    rebuilt = read("mimic-iv", "icu/chartevents")
    assert rebuilt["storetime"].null_count() == rebuilt.height
    real = read("mimic-iii", "CHARTEVENTS")
    assert real["storetime"].null_count() < real.height / 10
    assert real["itemid"].is_sorted()
    assert not real["subject_id"].is_sorted()
    assert "None" in set(rebuilt["value"]) | set(real["value"])


def test_cutting_again_gives_the_same_cells(tmp_path):
    for release in ("mimic-iv", "mimic-iii"):
        rows = cut(DEMO / release, tmp_path / release, release, ITEMS.cast(pl.String))
        for name, (before, after) in rows.items():
            assert before == after, name
            again = pl.read_csv(tmp_path / release / f"{name}.csv.gz", infer_schema=False)
            shipped = pl.read_csv(DEMO / release / f"{name}.csv.gz", infer_schema=False)
            assert again.equals(shipped)


def test_cutting_drops_other_items_and_unused_codes(tmp_path):
    for name in COLUMNS["mimic-iii"]:
        table = pl.read_csv(DEMO / "mimic-iii" / f"{name}.csv.gz", infer_schema=False)
        if name == "CHARTEVENTS":
            table = table.head(50)
        if name == "LABEVENTS":
            other = table.head(3).with_columns(itemid=pl.lit("1"))
            table = pl.concat([other, table])
        if name == "D_ICD_DIAGNOSES":
            table = pl.concat([table.head(2).with_columns(icd9_code=pl.lit("000")), table])
        table = table.with_columns(unused=pl.lit("x"))
        (tmp_path / f"{name}.csv.gz").write_bytes(_packed(table))
    rows = cut(tmp_path, tmp_path / "out", "mimic-iii", ITEMS.cast(pl.String))
    assert rows["LABEVENTS"] == (4_572, 4_569)
    assert rows["D_ICD_DIAGNOSES"] == (563, 561)
    written = pl.read_csv(tmp_path / "out" / "LABEVENTS.csv.gz", infer_schema=False)
    assert written.columns == COLUMNS["mimic-iii"]["LABEVENTS"].split()


def _packed(table: pl.DataFrame) -> bytes:
    return gzip.compress(table.write_csv().encode(), mtime=0)
