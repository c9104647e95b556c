"""How shards become batches: rows, normalisation, image transforms, loading."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from data.config import Config


class ImageTransform(Config):
    """Resize the short side, augment in training, crop, ImageNet mean and std."""

    resize: int = Field(default=256, ge=8)
    size: int = Field(default=224, ge=8)
    augment: bool = True
    """Random flip and affine in training, keyed by (seed, epoch, row)."""
    crop: Literal["center", "random"] = "center"
    """Crop in training; evaluation always crops the centre."""
    shear: float = Field(default=0.0, ge=0)
    """Degrees of shear in training."""


class LabColumns(Config):
    """Which items are the columns of the lab matrix, and how they are scaled to [0, 1]."""

    top: int = Field(default=100, ge=1)
    """The items with the most admissions of the train split."""
    clip: tuple[float, float] = (0.005, 0.995)
    """Quantiles of the train split that values are clipped to; they become 0 and 1."""
    log_skew: float | None = 2.0
    """log(1 + x) where the clipped values are skewed by more than this; null never."""

    @model_validator(mode="after")
    def _ordered(self) -> LabColumns:
        if not 0 <= self.clip[0] < self.clip[1] <= 1:
            raise ValueError(f"clip must be two rising quantiles in [0, 1], but got {self.clip}")
        return self


class LeaveOut(Config):
    """A fold of the train split's patients, by a hash of subject_id."""

    fold: int = Field(ge=0)
    """Which one is left out, from 0."""
    of: int = Field(ge=2)
    """How many folds there are."""

    @model_validator(mode="after")
    def _within(self) -> LeaveOut:
        if self.fold >= self.of:
            raise ValueError(f"fold ({self.fold}) must be below of ({self.of}): count from 0")
        return self


class BatchConfig(Config):
    """From shards to batches."""

    normalizer: Literal["fitted", "published"] = "fitted"
    """Fitted on the train split, or the MIMIC-III statistics all three repositories ship."""
    zero_beyond: float | None = Field(default=None, gt=0)
    """Normalised values beyond +-this become 0 (DrFuse's loader: 10)."""
    labs: LabColumns = LabColumns()
    """Columns of the lab matrix (tasks of admissions)."""
    train_rows: Literal["partial", "paired"] = "partial"
    """Train on every row, or only on rows with an image."""
    leave_out: LeaveOut | None = None
    """Train on the other folds' patients only, so that this fold's rows can be embedded by a model
    that has not seen them (docs/note-llm.md)."""
    selection_rows: Literal["partial", "paired"] = "partial"
    """Rows of the validation split that select the best checkpoint."""
    unpaired_fraction: float = Field(default=1.0, ge=0, le=1)
    """Share of the unpaired training rows that is used (MedFuse OPTIMAL: 0.2, 0.1)."""
    withhold_cxr: float = Field(default=0.0, ge=0, le=1)
    """Share of each training batch's rows whose image is withheld (DrFuse, matched: 0.3)."""
    unpaired_evaluation: Literal["each_once", "with_replacement"] = "each_once"
    """Unpaired rows of the PARTIAL test set, as they are or drawn as the released code does."""
    max_steps: int | None = Field(default=None, ge=1)
    """Cut of the series at this many bins (DrFuse: 350)."""
    image: ImageTransform = ImageTransform()
    processes: int = Field(default=0, ge=0)
    """Decoding processes per worker; 0 decodes in the worker."""
    cache_dir: Path | None = None
    """Local folder of the row cache; default: the scratch folder."""
