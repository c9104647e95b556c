"""How a cohort is extracted: the sources, and one switch for each published choice.

Defaults are the `corrected` preset; `ray_jobs/presets/` holds the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from data.config import Config


class Sources(Config):
    """Where the raw (or staged) tables lie."""

    mimic_iv: Path | None = None
    """Folder of MIMIC-IV (1.0 with core/, 2.2, 3.1), raw or staged."""
    mimic_iii: Path | None = None
    """Folder of MIMIC-III 1.4, raw or staged."""
    mimic_cxr: Path | None = None
    """Folder of MIMIC-CXR-JPG 2.0/2.1, or of a flat resized copy beside its tables."""
    notes: Path | None = None
    """Folder of MIMIC-IV-Note, or of MIMIC-III's NOTEEVENTS."""
    meds: Path | None = None
    """Folder of a MEDS dataset: any hospital's, for tasks whose sample is an admission."""

    @model_validator(mode="after")
    def _one_release(self) -> Sources:
        given = [name for name in ("mimic_iv", "mimic_iii", "meds") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both set: a cohort comes from one of them")
        return self


class Split(Config):
    """Patient-wise split by a hash of subject_id, or by given lists."""

    seed: int = 0
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    """Train, validation and test; they sum to 1."""
    val_subjects: Path | None = None
    """CSV with a subject_id column; with test_subjects it overrides the hash."""
    test_subjects: Path | None = None

    @model_validator(mode="after")
    def _whole(self) -> Split:
        if abs(sum(self.fractions) - 1) > 1e-9 or min(self.fractions) < 0:
            raise ValueError(f"fractions must be >= 0 and sum to 1, but got {self.fractions}")
        if (self.val_subjects is None) != (self.test_subjects is None):
            raise ValueError("val_subjects and test_subjects are given together or not at all")
        return self


class MedsCodes(Config):
    """How the codes of a MEDS dataset begin; the defaults are those of the MIMIC-IV conversion."""

    admission: str = "HOSPITAL_ADMISSION"
    discharge: str = "HOSPITAL_DISCHARGE"
    diagnosis_icd9: str = "DIAGNOSIS//ICD//9//"
    """What follows is the code."""
    diagnosis_icd10: str = "DIAGNOSIS//ICD//10//"
    lab: str = "LAB//"
    """What follows is the item and, after `//`, its unit."""
    note: str = "NOTE//"
    """What follows is the kind of note; the text is in text_value."""
    discharge_note: str = "Discharge summary"
    """The kind of note that is used."""
    sex: str = "GENDER//"
    """What follows is M or F."""
    birth: str = "MEDS_BIRTH"
    days_after: int = Field(default=7, ge=0)
    """Without hadm_id: a diagnosis or note this long after a discharge still belongs to it."""


class AdmissionConfig(Config):
    """Which admissions are samples, and what is read of their notes, labs and diagnoses."""

    min_age: int = Field(default=18, ge=0)
    min_visits: int = Field(default=2, ge=1)
    """Admissions that a patient must have."""
    target_visits: Literal["all", "from_second"] = "all"
    label_scope: Literal["admission", "patient_union"] = "admission"
    """`patient_union`: every admission carries the labels of all the patient's admissions."""
    label_file: Path | None = None
    """A YAML of code lists in place of the task's shipped one (docs/notes-and-labs.md)."""
    label_hierarchy: bool = False
    """Apply the file's hierarchy: a milder label is 0 where its severer group is coded."""
    sections: Literal["admission", "all"] = "admission"
    """`admission`: the four sections of what was known at admission; `all` leaks diagnoses."""
    headers: Literal["paper", "wide"] = "paper"
    """`wide` also knows headers such as CC, HPI, Medications and Past History."""
    late_notes: Literal["drop", "keep"] = "drop"
    """A summary written on a later day than the discharge; `keep` moves the prediction time."""
    lab_window: Literal["stay", "24h", "48h"] = "stay"
    """Labs of the whole stay, or of its first hours."""
    lab_value: Literal["last", "mean"] = "last"
    """Which result of an item counts in the lab matrix; the text always gives the last."""
    lab_units: Literal["convert", "as_found"] = "convert"
    """`convert`: known units are brought to one (data.lab_units)."""
    abnormal: Literal["flag", "range"] = "flag"
    """`flag`: the laboratory's; `range`: outside the common adult range of well-known tests."""
    history_visits: int = Field(default=1, ge=0)
    """Earlier admissions whose sections are appended to the note."""
    require_notes: bool = True
    require_labs: bool = True
    note_limit: int = Field(default=200_000, ge=1)
    """Characters of the kept sections; more is cut off and counted."""
    meds: MedsCodes = MedsCodes()


class ExtractConfig(Config):
    """From raw tables to shards."""

    timestep_hours: float = Field(default=1.0, gt=0)
    """Bin width of the series; the MedFuse paper says 2, every released script uses 1."""
    outliers: Literal["clip", "keep"] = "clip"
    """`clip`: outside the outlier range is missing, else clipped to the valid range."""
    icd10_map: Literal["resolved", "forward_last", "backward_first"] = "resolved"
    """ICD-10 to CCS: GEM flags resolved; last target of the forward GEM; first of the backward."""
    icd_join: Literal["version_code", "code"] = "version_code"
    """Key of diagnoses: (icd_version, icd_code), or the code alone."""
    units: Literal["read", "as_found"] = "read"
    """`read`: valueuom decides on Fahrenheit, inch, pound, percent; else the released code."""
    duplicates: Literal["storetime", "text_maximum"] = "storetime"
    """Two values of a variable at one charttime: the later stored, or the authors' sort."""
    derive: bool = True
    """GCS total from its parts and capillary refill from MetaVision items; else constants."""
    age: Literal["admission", "anchor"] = "admission"
    deaths: Literal["time", "mixed"] = "time"
    """In-hospital death by time of death, or the authors' mix of dates and times."""
    event_to_stay: Literal["stay_id_then_time", "as_found"] = "stay_id_then_time"
    """`stay_id_then_time`: the stay id, else the time inside one stay; else the released join."""
    error_rows: Literal["drop", "keep"] = "drop"
    """MIMIC-III CHARTEVENTS rows with ERROR = 1."""
    availability: Literal["storetime", "charttime"] = "storetime"
    """When a value becomes known; later than the prediction time, it is not used."""
    cxr_window: Literal["task", "stay"] = "task"
    """Images up to the task's window (48 h), or (published mortality) up to outtime."""
    cxr_view: str = "AP"
    """ViewPosition of images paired with stays."""
    image_short_side: int = Field(default=256, ge=16)
    split: Split = Split()
    admissions: AdmissionConfig = AdmissionConfig()
    """Tasks whose sample is an admission."""
    partitions: int = Field(default=0, ge=0)
    """Number of subject partitions; 0 chooses from the file sizes."""
    late_margin_hours: float = Field(default=24.0, ge=0)
    """An event this long after death or discharge is still accepted; later ones are quarantined."""
