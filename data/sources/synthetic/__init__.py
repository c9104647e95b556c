"""The synthetic hospital: raw tables, images and notes in MIMIC's layouts, with known truth."""

from __future__ import annotations

from data.sources.synthetic.config import HospitalConfig, Release
from data.sources.synthetic.generate import SyntheticTruth, generate
from data.sources.synthetic.truth import truth_report, truth_scores

__all__ = [
    "HospitalConfig",
    "Release",
    "SyntheticTruth",
    "generate",
    "truth_report",
    "truth_scores",
]
