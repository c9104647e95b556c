"""The raw tables of MIMIC-IV 1.0 (with core/), 2.x and 3.x that the benchmark needs."""

from __future__ import annotations

from data.sources.layout import TableSpec, same

FOLDERS = ("core", "hosp", "icu")

TABLES = (
    TableSpec(
        table="patients",
        into="patients",
        columns=same("subject_id anchor_age anchor_year dod", sex="gender"),
        key="subject_id",
    ),
    TableSpec(
        table="admissions",
        into="admissions",
        columns=same(
            "subject_id hadm_id admittime dischtime deathtime", ethnicity="race ethnicity"
        ),
        key="hadm_id",
    ),
    TableSpec(
        table="icustays",
        into="icustays",
        columns=same("subject_id hadm_id stay_id first_careunit last_careunit intime outtime los"),
        key="stay_id",
    ),
    TableSpec(
        table="diagnoses_icd",
        into="diagnoses",
        columns=same("subject_id hadm_id seq_num icd_code icd_version"),
    ),
    TableSpec(table="d_icd_diagnoses", into="icd_dictionary", columns=same("icd_code icd_version")),
    TableSpec(
        table="chartevents",
        into="events",
        source="chart",
        columns=same(
            "subject_id hadm_id stay_id itemid charttime storetime value valuenum valueuom"
        ),
    ),
    TableSpec(
        table="labevents",
        into="events",
        source="lab",
        columns=same("subject_id hadm_id itemid charttime storetime value valuenum valueuom"),
    ),
    TableSpec(
        table="outputevents",
        into="events",
        source="output",
        columns=same("subject_id hadm_id stay_id itemid charttime storetime value valueuom"),
    ),
)
