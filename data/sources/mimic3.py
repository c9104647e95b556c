"""The raw tables of MIMIC-III 1.4 that the benchmark needs."""

from __future__ import annotations

from data.sources.layout import TableSpec, same

TABLES = (
    TableSpec(
        table="patients",
        into="patients",
        columns=same("subject_id dob dod", sex="gender"),
        key="subject_id",
    ),
    TableSpec(
        table="admissions",
        into="admissions",
        columns=same("subject_id hadm_id admittime dischtime deathtime ethnicity"),
        key="hadm_id",
    ),
    TableSpec(
        table="icustays",
        into="icustays",
        columns=same(
            "subject_id hadm_id first_careunit last_careunit first_wardid last_wardid"
            " intime outtime los",
            stay_id="icustay_id",
        ),
        key="stay_id",
    ),
    TableSpec(
        table="diagnoses_icd",
        into="diagnoses",
        columns=same("subject_id hadm_id seq_num", icd_code="icd9_code"),
        constants={"icd_version": 9},
    ),
    TableSpec(
        table="d_icd_diagnoses",
        into="icd_dictionary",
        columns=same("", icd_code="icd9_code"),
        constants={"icd_version": 9},
    ),
    TableSpec(
        table="chartevents",
        into="events",
        source="chart",
        columns=same(
            "subject_id hadm_id itemid charttime storetime value valuenum valueuom error",
            stay_id="icustay_id",
        ),
    ),
    TableSpec(
        table="labevents",
        into="events",
        source="lab",
        columns=same("subject_id hadm_id itemid charttime value valuenum valueuom"),
    ),
    TableSpec(
        table="outputevents",
        into="events",
        source="output",
        columns=same(
            "subject_id hadm_id itemid charttime storetime value valueuom",
            stay_id="icustay_id",
            error="iserror",
        ),
    ),
)
