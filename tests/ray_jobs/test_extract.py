"""The job names the preset that its switches are."""

from __future__ import annotations

import pytest

from data.switches import AdmissionConfig, ExtractConfig, Split
from ray_jobs.config import extract_config
from ray_jobs.extract import name_of


@pytest.mark.parametrize("preset", ["corrected", "code", "paper"])
def test_a_preset_has_its_own_name(preset: str) -> None:
    config = extract_config(preset)  # type: ignore[arg-type]
    assert name_of(config, preset) == preset
    assert name_of(config, "corrected") == preset
    cut = config.model_copy(update={"partitions": 7, "split": Split(seed=3)})
    assert name_of(cut, preset) == preset


def test_other_switches_are_custom() -> None:
    assert name_of(ExtractConfig(outliers="keep"), "corrected") == "custom"
    assert name_of(extract_config("code", ["derive=true"]), "code") == "custom"


def test_what_describes_a_hospital_is_no_rule() -> None:
    own = {"label_file": "mine.yaml", "abnormal": "range", "meds": {"lab": "LABORATORY//"}}
    assert name_of(ExtractConfig(admissions=AdmissionConfig(**own)), "corrected") == "corrected"
    leaky = AdmissionConfig(**own, sections="all")
    assert name_of(ExtractConfig(admissions=leaky), "corrected") == "custom"


def test_the_papers_bin_width_depends_on_the_model() -> None:
    assert name_of(extract_config("paper", ["timestep_hours=2.0"]), "paper") == "paper"
    assert name_of(extract_config("paper", ["timestep_hours=3.0"]), "paper") == "custom"
