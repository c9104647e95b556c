"""What an evaluation computes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data.config import Config


class EvaluateConfig(Config):
    """Bootstrap, sets and sweeps."""

    split: Literal["train", "val", "test"] = "test"
    resamples: int = Field(default=1000, ge=1)
    macro_interval: Literal["patient_mean", "mean_of_labels"] = "patient_mean"
    """CI of the macro mean resampled by patient, or the papers' mean of per-label row CIs."""
    sets: tuple[Literal["partial", "paired"], ...] = ("partial", "paired")
    withhold_cxr: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Shares of rows whose image is withheld in the missingness sweep."""
    tune_thresholds: bool = False
    """Beside decisions at a probability of 0.5, score those at thresholds that give each label its
    highest F1 on the validation split, which is predicted too."""
    calibration_bins: int = Field(default=10, ge=2)
    seed: int = 0
