"""The written hospital: layouts, determinism, prefix, quirks, memory."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pytest
from PIL import Image

from data.errors import InputError
from data.ontology import phenotype_map
from data.sources.synthetic import generate, truth_report, truth_scores
from data.sources.synthetic.codes import CODES
from data.sources.synthetic.planting import PLANTED

if TYPE_CHECKING:
    from pathlib import Path

IV_COLUMNS = {
    "hosp/patients": "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod",
    "hosp/admissions": "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,"
    "admit_provider_id,admission_location,discharge_location,insurance,language,marital_status,"
    "race,edregtime,edouttime,hospital_expire_flag",
    "hosp/diagnoses_icd": "subject_id,hadm_id,seq_num,icd_code,icd_version",
    "hosp/d_icd_diagnoses": "icd_code,icd_version,long_title",
    "hosp/d_labitems": "itemid,label,fluid,category",
    "hosp/labevents": "labevent_id,subject_id,hadm_id,specimen_id,itemid,order_provider_id,"
    "charttime,storetime,value,valuenum,valueuom,ref_range_lower,ref_range_upper,flag,priority,"
    "comments",
    "icu/icustays": "subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los",
    "icu/chartevents": "subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,"
    "valuenum,valueuom,warning",
    "icu/outputevents": "subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,"
    "valueuom",
    "icu/d_items": "itemid,label,abbreviation,linksto,category,unitname,param_type,lownormalvalue,"
    "highnormalvalue",
}
III_COLUMNS = {
    "PATIENTS": "row_id,subject_id,gender,dob,dod,dod_hosp,dod_ssn,expire_flag",
    "ADMISSIONS": "row_id,subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,"
    "admission_location,discharge_location,insurance,language,religion,marital_status,ethnicity,"
    "edregtime,edouttime,diagnosis,hospital_expire_flag,has_chartevents_data",
    "ICUSTAYS": "row_id,subject_id,hadm_id,icustay_id,dbsource,first_careunit,last_careunit,"
    "first_wardid,last_wardid,intime,outtime,los",
    "CHARTEVENTS": "row_id,subject_id,hadm_id,icustay_id,itemid,charttime,storetime,cgid,value,"
    "valuenum,valueuom,warning,error,resultstatus,stopped",
    "LABEVENTS": "row_id,subject_id,hadm_id,itemid,charttime,value,valuenum,valueuom,flag",
    "OUTPUTEVENTS": "row_id,subject_id,hadm_id,icustay_id,charttime,itemid,value,valueuom,"
    "storetime,cgid,stopped,newbottle,iserror",
    "DIAGNOSES_ICD": "row_id,subject_id,hadm_id,seq_num,icd9_code",
    "D_ITEMS": "row_id,itemid,label,abbreviation,dbsource,linksto,category,unitname,param_type,"
    "conceptid",
    "D_LABITEMS": "row_id,itemid,label,fluid,category,loinc_code",
    "D_ICD_DIAGNOSES": "row_id,icd9_code,short_title,long_title",
    "NOTEEVENTS": "row_id,subject_id,hadm_id,chartdate,charttime,storetime,category,description,"
    "cgid,iserror,text",
}


def read(root: Path, name: str) -> pl.DataFrame:
    return pl.read_csv(root / f"{name}.csv.gz", infer_schema=False)


def header(root: Path, name: str) -> str:
    with gzip.open(root / f"{name}.csv.gz", "rt", encoding="utf-8") as handle:
        return handle.readline().strip()


def test_columns_are_those_of_mimic_iv(iv_hospital):
    assert {n: header(iv_hospital.ehr, n) for n in IV_COLUMNS} == IV_COLUMNS
    assert header(iv_hospital.notes, "note/discharge") == (
        "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text"
    )
    assert header(iv_hospital.cxr, "mimic-cxr-2.0.0-metadata") == (
        "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,"
        "StudyDate,StudyTime,ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,"
        "PatientOrientationCodeSequence_CodeMeaning"
    )
    assert header(iv_hospital.cxr, "mimic-cxr-2.0.0-split") == "dicom_id,study_id,subject_id,split"
    assert len(header(iv_hospital.cxr, "mimic-cxr-2.0.0-chexpert").split(",")) == 16


def test_columns_are_those_of_mimic_iii_in_capitals(iii_hospital):
    expected = {n: c.upper() for n, c in III_COLUMNS.items()}
    assert {n: header(iii_hospital.ehr, n) for n in expected} == expected


def test_equal_seeds_are_equal_bytes_and_other_seeds_are_not(tmp_path, tree):
    made = [
        tree(generate(tmp_path / n, patients=6, seed=s, release="mimic-iv-3.1").truth.parent)
        for n, s in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert made[0] == made[1]
    assert made[0] != made[2]


@pytest.mark.parametrize("release", ["mimic-iv-2.2", "mimic-iii-1.4"])
def test_more_patients_extend_the_same_hospital(tmp_path, release):
    small, large = (
        generate(tmp_path / str(n), patients=n, seed=9, release=release, image_size=64)
        for n in (10, 45)
    )
    tables = [p.relative_to(small.truth.parent) for p in small.truth.parent.rglob("*.csv.gz")]
    assert len(tables) >= 14
    for name in tables:
        short = gzip.decompress((small.truth.parent / name).read_bytes())
        long = gzip.decompress((large.truth.parent / name).read_bytes())
        assert long.startswith(short), name
    images = {p.relative_to(small.cxr) for p in small.cxr.rglob("*.jpg")}
    assert images
    for name in images:
        assert (small.cxr / name).read_bytes() == (large.cxr / name).read_bytes()


def test_quirks_of_mimic_iv(iv_hospital):
    events = read(iv_hospital.ehr, "icu/chartevents")
    stays = read(iv_hospital.ehr, "icu/icustays")
    value, unit, item = events["value"], events["valueuom"], events["itemid"]
    number = events["valuenum"].cast(pl.Float64)
    assert {"ERROR", ">100", "None"} <= set(value.unique().to_list())
    assert value.str.contains(r"[A-Za-z>]").sum() > 0
    assert number.is_null().sum() > 0
    fahrenheit = item == "223761"
    assert ((number < 50) & (number > 20) & fahrenheit).any()
    assert unit.filter(fahrenheit).is_null().any()
    assert ((number > 80) & (item == "223762")).any()
    assert ((number <= 1) & (item == "223835")).any()
    assert ((number > 1) & (item == "223835")).any()
    assert ((unit == "lb") & (item == "226512")).any()
    assert (number >= 9999).any()
    assert unit.is_null().any()
    assert events["stay_id"].is_null().any()
    assert events["hadm_id"].is_null().any()
    assert (stays["first_careunit"] != stays["last_careunit"]).any()
    assert stays["hadm_id"].is_duplicated().any()
    twice = events.filter(pl.col("stay_id").is_not_null()).group_by(
        "stay_id", "charttime", "itemid"
    )
    assert (twice.agg(pl.col("storetime").n_unique())["storetime"] > 1).any()
    joined = events.join(stays.select("stay_id", "intime", "outtime"), on="stay_id")
    assert (joined["charttime"] < joined["intime"]).any()
    assert (joined["charttime"] > joined["outtime"]).any()
    labs = read(iv_hospital.ehr, "hosp/labevents")
    assert labs["hadm_id"].is_null().any()
    assert labs["hadm_id"].is_not_null().any()
    people = read(iv_hospital.ehr, "hosp/patients")
    ages = people["anchor_age"].cast(pl.Int64)
    assert ages.min() < 18
    assert ages.max() == 91


def test_deaths_are_recorded_in_mixed_ways(iv_hospital):
    admissions = read(iv_hospital.ehr, "hosp/admissions")
    joined = admissions.join(read(iv_hospital.ehr, "hosp/patients"), on="subject_id")
    died = joined.filter(pl.col("hospital_expire_flag") == "1")
    assert died["deathtime"].is_null().any()
    assert died["dod"].is_null().any()
    assert (died["deathtime"].is_not_null() | died["dod"].is_not_null()).all()
    alive = joined.filter(pl.col("hospital_expire_flag") == "0")
    assert alive["dod"].is_not_null().any()
    found = pl.read_parquet(iv_hospital.truth / "stays.parquet")
    dead = set(found.filter(pl.col("label_In-hospital mortality") == 1)["hadm_id"].to_list())
    assert dead == set(died["hadm_id"].cast(pl.Int64).to_list())


def test_quirks_of_images(iv_hospital):
    table = read(iv_hospital.cxr, "mimic-cxr-2.0.0-metadata")
    assert {"AP", "PA", "LATERAL"} <= set(table["ViewPosition"].to_list())
    paths = [
        iv_hospital.cxr / f"files/p{s[:2]}/p{s}/s{t}/{d}.jpg"
        for s, t, d in table.select("subject_id", "study_id", "dicom_id").iter_rows()
    ]
    there = [p.is_file() for p in paths]
    assert 0.9 < np.mean(there) < 1.0
    with Image.open(paths[there.index(True)]) as picture:
        assert picture.mode == "L"
        assert picture.size == (64, 64)
    truth = pl.read_parquet(iv_hospital.truth / "stays.parquet")
    assert 0.45 < truth["paired"].mean() < 0.75
    sick = truth.filter(pl.col("acuity") > 0)["paired"].mean()
    assert sick > truth.filter(pl.col("acuity") <= 0)["paired"].mean()


def test_notes_have_their_sections_and_marks(iv_hospital, iii_hospital):
    four = (
        "Chief Complaint:",
        "History of Present Illness:",
        "Past Medical History:",
        "Medications on Admission:",
    )
    plain = read(iv_hospital.notes, "note/discharge")["text"]
    marked = read(iii_hospital.notes, "NOTEEVENTS")["TEXT"]
    for section in four:
        assert plain.str.contains(section, literal=True).all()
        assert marked.str.contains(section, literal=True).all()
    assert plain.str.contains("___").all()
    assert not plain.str.contains("[**", literal=True).any()
    assert marked.str.contains("[**", literal=True).all()


def test_mimic_iii_has_both_sources_and_shifted_ages(iii_hospital):
    stays = read(iii_hospital.ehr, "ICUSTAYS")
    assert set(stays["DBSOURCE"].to_list()) == {"carevue", "metavision"}
    assert (stays["FIRST_WARDID"] != stays["LAST_WARDID"]).any()
    events = read(iii_hospital.ehr, "CHARTEVENTS")
    assert {"211", "220045", "198"} <= set(events["ITEMID"].unique().to_list())
    assert {"1 No Response", "None", "1.0 ET/Trach"} <= set(events["VALUE"].unique().to_list())
    assert (events["ERROR"] == "1").any()
    born = read(iii_hospital.ehr, "PATIENTS")["DOB"].str.slice(0, 4).cast(pl.Int64)
    assert born.min() < 1950
    assert born.max() > 2000


@pytest.mark.parametrize("rule", ["forward_last", "backward_gem_fixed"])
def test_codes_carry_exactly_the_planted_labels(iv_hospital, rule):
    truth = pl.read_parquet(iv_hospital.truth / "stays.parquet").unique("hadm_id")
    rows = read(iv_hospital.ehr, "hosp/diagnoses_icd").with_columns(
        pl.col("icd_version").cast(pl.Int8), pl.col("hadm_id").cast(pl.Int64)
    )
    assert set(rows["icd_version"].to_list()) == {9, 10}
    found = rows.join(phenotype_map(rule), on=["icd_version", "icd_code"]).select(
        "hadm_id", "label"
    )
    coded = set(found.unique().iter_rows())
    described = set(rows["hadm_id"].to_list())
    planted = {
        (hadm, k)
        for k in range(len(CODES))
        for hadm in truth.filter(pl.col(f"label_{PLANTED[k].name}") == 1)["hadm_id"].to_list()
        if hadm in described
    }
    assert coded == planted


def test_latents_do_not_depend_on_what_is_written(tmp_path):
    full = generate(tmp_path / "a", patients=30, seed=5, release="mimic-iv-2.2", image_size=64)
    bare = generate(
        tmp_path / "b",
        patients=30,
        seed=5,
        release="mimic-iii-1.4",
        cxr=False,
        notes=False,
        quirks=False,
        chart_events_per_stay=0,
    )
    left, right = (pl.read_parquet(m.truth / "stays.parquet") for m in (full, bare))
    names = [c for c in left.columns if c.startswith(("label_", "latent_", "oracle_"))]
    assert left.select(names).equals(right.select(names))


def test_without_quirks_no_value_is_malformed(tmp_path):
    clean = generate(
        tmp_path / "c", patients=30, seed=5, release="mimic-iv-2.2", cxr=False, quirks=False
    )
    events = read(clean.ehr, "icu/chartevents")
    assert events["stay_id"].null_count() == 0
    assert not (events["value"] == "ERROR").any()


def test_truth_report_names_every_label(iv_hospital):
    report = truth_report(iv_hospital.truth.parent)
    assert all(label.name in report for label in PLANTED)
    scores = truth_scores(iv_hospital.truth.parent)
    xor = scores.filter(pl.col("kind") == "xor").row(0, named=True)
    assert xor["ehr+cxr"] > 0.8
    assert xor["late"] <= 0.55
    described = json.loads((iv_hospital.truth / "truth.json").read_text())
    assert described["config"]["image_grid"] == 64


def test_memory_is_flat_in_patients(tmp_path):
    peaks = []
    for patients in (80, 240):
        tracemalloc.start()
        generate(
            tmp_path / str(patients),
            patients=patients,
            seed=1,
            release="mimic-iv-2.2",
            cxr=False,
            chart_events_per_stay=0,
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_mistakes_are_refused(tmp_path):
    (tmp_path / "kept").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        generate(tmp_path, patients=1, seed=0, release="mimic-iv-2.2")
    for wrong in ({"patients": 0, "seed": 0}, {"patients": 1, "seed": -1}):
        with pytest.raises(InputError):
            generate(tmp_path / "new", release="mimic-iv-2.2", **wrong)
    with pytest.raises(InputError, match="truth"):
        truth_report(tmp_path)
