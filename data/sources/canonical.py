"""The typed tables that every release is read into, and that every cohort rule works on.

Times are naive microseconds (MIMIC's shifted clock). Text is as found, stripped of nothing: the
cleaning rules decide. Absent is null, never an empty string.
"""

from __future__ import annotations

import polars as pl

TIME = pl.Datetime("us")

TABLES: dict[str, dict[str, pl.DataType | type[pl.DataType]]] = {
    "patients": {
        "subject_id": pl.Int64,
        "sex": pl.String,
        "anchor_age": pl.Int32,  # MIMIC-IV
        "anchor_year": pl.Int32,  # MIMIC-IV
        "dob": TIME,  # MIMIC-III
        "dod": TIME,  # a date in MIMIC-IV: midnight
    },
    "admissions": {
        "subject_id": pl.Int64,
        "hadm_id": pl.Int64,
        "admittime": TIME,
        "dischtime": TIME,
        "deathtime": TIME,
        "ethnicity": pl.String,  # `race` from MIMIC-IV 2.0 on
    },
    "icustays": {
        "subject_id": pl.Int64,
        "hadm_id": pl.Int64,
        "stay_id": pl.Int64,  # icustay_id in MIMIC-III
        "first_careunit": pl.String,
        "last_careunit": pl.String,
        "first_wardid": pl.Int64,  # MIMIC-III
        "last_wardid": pl.Int64,  # MIMIC-III
        "intime": TIME,
        "outtime": TIME,
        "los": pl.Float64,
    },
    "diagnoses": {
        "subject_id": pl.Int64,
        "hadm_id": pl.Int64,
        "seq_num": pl.Int32,
        "icd_code": pl.String,  # no dot, leading zeros kept
        "icd_version": pl.Int8,  # 9 throughout MIMIC-III
    },
    # Chart, lab and output rows of the needed items (data.events.ITEMS), one table.
    "events": {
        "source": pl.String,  # chart | lab | output
        "row": pl.Int64,  # position in its file: "last in file order"
        "subject_id": pl.Int64,
        "hadm_id": pl.Int64,
        "stay_id": pl.Int64,
        "itemid": pl.Int64,
        "charttime": TIME,
        "storetime": TIME,
        "value": pl.String,
        "valuenum": pl.Float64,
        "valueuom": pl.String,
        "error": pl.Boolean,  # MIMIC-III CHARTEVENTS ERROR = 1
    },
    # All laboratory results (tasks of admissions), with the laboratory's own flag.
    "labs": {
        "subject_id": pl.Int64,
        "hadm_id": pl.Int64,
        "item": pl.String,  # itemid, or what a MEDS code names
        "charttime": TIME,
        "storetime": TIME,
        "value": pl.String,
        "valuenum": pl.Float64,
        "unit": pl.String,
        "flag": pl.String,
    },
    "lab_names": {"item": pl.String, "name": pl.String},
    # Discharge summaries.
    "notes": {
        "subject_id": pl.Int64,
        "hadm_id": pl.Int64,
        "charttime": TIME,
        "storetime": TIME,
        "category": pl.String,
        "addendum": pl.Boolean,
        "text": pl.String,
    },
    # Rows of a MEDS dataset; data.sources.meds makes the tables above of them.
    "meds": {
        "subject_id": pl.Int64,
        "time": TIME,
        "code": pl.String,
        "numeric_value": pl.Float64,
        "text_value": pl.String,
        "hadm_id": pl.Int64,
    },
    # The split that a MEDS dataset gives a subject.
    "given_splits": {"subject_id": pl.Int64, "split": pl.String},
    # Dictionary of diagnoses: what the released code joins with.
    "icd_dictionary": {"icd_code": pl.String, "icd_version": pl.Int8},
    # MIMIC-CXR-JPG metadata with its CheXpert labels and split joined by study_id.
    "cxr": {
        "subject_id": pl.Int64,
        "study_id": pl.Int64,
        "dicom_id": pl.String,
        "view": pl.String,
        "studytime": TIME,
        "path": pl.String,  # relative to the CXR folder, built from ids, never by walking
        "cxr_split": pl.String,
        "chexpert": pl.List(pl.Float32),  # 14, as found: 1, 0, -1 or null; null where no row
    },
}
