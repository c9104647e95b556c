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

    @model_validator(mode="after")
    def _one_release(self) -> Sources:
        if self.mimic_iv is not None and self.mimic_iii is not None:
            raise ValueError("mimic_iv and mimic_iii are both set: a cohort comes from one of them")
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
    partitions: int = Field(default=0, ge=0)
    """Number of subject partitions; 0 chooses from the file sizes."""
    late_margin_hours: float = Field(default=24.0, ge=0)
    """An event this long after death or discharge is still accepted; later ones are quarantined."""
