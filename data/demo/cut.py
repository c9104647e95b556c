"""Cut the open MIMIC demos to what the 17-variable benchmark and the phenotype labels need.

    python -m data.demo.cut --items data/resources/items.csv \
        --mimic-iv DIR --mimic-iii DIR [--out data/demo]

The items file is any CSV with an `itemid` column (lines of `#` are remarks). MIMIC's folder layout,
file names, column names, text and row order are kept; only rows of other items and columns that
nothing reads are left out. The written files are byte-identical on every run.
"""

from __future__ import annotations

import argparse
import gzip
import sys
from pathlib import Path

import polars as pl

from data.files import atomic_path

EVENTS_IV = "subject_id hadm_id stay_id charttime storetime itemid value valuenum valueuom"
EVENTS_III = "row_id subject_id hadm_id icustay_id itemid charttime storetime value valuenum"

COLUMNS = {
    "mimic-iv": {
        "hosp/patients": "subject_id gender anchor_age anchor_year anchor_year_group dod",
        "hosp/admissions": "subject_id hadm_id admittime dischtime deathtime race"
        " hospital_expire_flag",
        "icu/icustays": "subject_id hadm_id stay_id first_careunit last_careunit intime outtime"
        " los",
        "hosp/diagnoses_icd": "subject_id hadm_id seq_num icd_code icd_version",
        "hosp/d_icd_diagnoses": "icd_code icd_version long_title",
        "icu/d_items": "itemid label abbreviation linksto category unitname param_type",
        "hosp/d_labitems": "itemid label fluid category",
        "icu/chartevents": f"{EVENTS_IV} warning",
        "icu/outputevents": "subject_id hadm_id stay_id charttime storetime itemid value valueuom",
        "hosp/labevents": "labevent_id subject_id hadm_id itemid charttime storetime value"
        " valuenum valueuom flag",
    },
    "mimic-iii": {
        "PATIENTS": "row_id subject_id gender dob dod dod_hosp dod_ssn expire_flag",
        "ADMISSIONS": "row_id subject_id hadm_id admittime dischtime deathtime ethnicity"
        " hospital_expire_flag",
        "ICUSTAYS": "row_id subject_id hadm_id icustay_id dbsource first_careunit last_careunit"
        " first_wardid last_wardid intime outtime los",
        "DIAGNOSES_ICD": "row_id subject_id hadm_id seq_num icd9_code",
        "D_ICD_DIAGNOSES": "row_id icd9_code short_title long_title",
        "D_ITEMS": "row_id itemid label abbreviation dbsource linksto category unitname",
        "D_LABITEMS": "row_id itemid label fluid category",
        "CHARTEVENTS": f"{EVENTS_III} valueuom warning error",
        "OUTPUTEVENTS": "row_id subject_id hadm_id icustay_id charttime itemid value valueuom"
        " storetime iserror",
        "LABEVENTS": "row_id subject_id hadm_id itemid charttime value valuenum valueuom flag",
    },
}
FOUND_AS = {"icu/chartevents": ("icu/chartevents", "icu/chartevents_reconstructed")}
"""The reconstruction is stored under the real table's name, which the readers look for."""


def cut(source: Path, target: Path, release: str, items: pl.Series) -> dict[str, tuple[int, int]]:
    """Write one demo's cut; returns rows before and after for each table."""
    rows = {}
    diagnoses = _read(source, "hosp/diagnoses_icd" if release == "mimic-iv" else "DIAGNOSES_ICD")
    for name, columns in COLUMNS[release].items():
        table = _read(source, name)
        kept = table.select(columns.split())
        if "itemid" in kept.columns:
            kept = kept.filter(pl.col("itemid").is_in(items.implode()))
        if name.lower().endswith("d_icd_diagnoses"):
            code = "icd_code" if "icd_code" in kept.columns else "icd9_code"
            kept = kept.filter(pl.col(code).is_in(diagnoses[code].implode()))
        _write(kept, target / f"{name}.csv.gz")
        rows[name] = (table.height, kept.height)
    return rows


def _read(source: Path, name: str) -> pl.DataFrame:
    for candidate in FOUND_AS.get(name, (name,)):
        path = source / f"{candidate}.csv.gz"
        if path.is_file():
            return pl.read_csv(path, infer_schema=False)
    raise FileNotFoundError(f"{source}: neither of {FOUND_AS.get(name, (name,))} as .csv.gz")


def _write(table: pl.DataFrame, path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(table.write_csv().encode(), mtime=0))


def main() -> None:
    """Cut the demos named on the command line and print each table's rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--items", type=Path, required=True, help="CSV with a column itemid")
    parser.add_argument("--mimic-iv", type=Path, help="folder of the MIMIC-IV demo 2.2")
    parser.add_argument("--mimic-iii", type=Path, help="folder of the MIMIC-III demo 1.4")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    items = pl.read_csv(given.items, infer_schema=False, comment_prefix="#")["itemid"].unique()
    for release, source in (("mimic-iv", given.mimic_iv), ("mimic-iii", given.mimic_iii)):
        if source is None:
            continue
        for name, (before, after) in cut(source, given.out / release, release, items).items():
            sys.stdout.write(f"{release}/{name}: {after:,} of {before:,} rows\n")


if __name__ == "__main__":
    main()
