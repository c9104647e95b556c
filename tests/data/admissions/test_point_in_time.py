"""What lies after the prediction time changes no sample; what lies just before it does."""

from __future__ import annotations

from datetime import timedelta

import polars as pl
import pytest

from data.extraction import extract_partition
from data.switches import AdmissionConfig, ExtractConfig
from data.tasks import task_spec

TASK = task_spec("diagnoses")
FEATURES = ("notes", "notes_available_at", "lab_items", "labs", "lab_units", "lab_text")


def features(tables, config=None) -> pl.DataFrame:
    config = config or ExtractConfig()
    samples = extract_partition(tables, TASK, config).samples
    return samples.select("hadm_id", "prediction_time", *FEATURES)


def ends(tables, table: str) -> pl.Series:
    """Each row's discharge, by its admission id."""
    times = tables["admissions"].select("hadm_id", "dischtime")
    return tables[table].join(times, on="hadm_id", how="left", maintain_order="left")["dischtime"]


@pytest.mark.parametrize("seed", range(4))
def test_later_labs_change_nothing_and_earlier_ones_do(clinic, seed):
    tables = clinic(seed, patients=20)
    before = features(tables)
    end = ends(tables, "labs")
    later = pl.coalesce("storetime", "charttime") > end
    poisoned = tables["labs"].with_columns(
        pl.when(later).then(1e6).otherwise("valuenum").alias("valuenum"),
        pl.when(later).then(pl.lit("poison")).otherwise("value").alias("value"),
    )
    assert int(tables["labs"].select(later.sum()).item()) > 0
    assert features({**tables, "labs": poisoned}).equals(before)
    earlier = pl.col("charttime") <= end
    moved = tables["labs"].with_columns(
        pl.when(earlier).then(pl.col("valuenum") + 1).otherwise("valuenum").alias("valuenum")
    )
    assert not features({**tables, "labs": moved}).equals(before)


def test_a_result_stored_after_the_discharge_is_not_known(clinic):
    tables = clinic(1, patients=40)
    named = tables["labs"].filter(pl.col("hadm_id").is_not_null())
    late = pl.Series("storetime", ends({**tables, "labs": named}, "labs") + timedelta(minutes=1))
    stored = {**tables, "labs": named.with_columns(late)}
    charted = ExtractConfig(availability="charttime")
    assert features(stored, charted)["labs"].is_not_null().any()
    assert features(stored).height == 0


@pytest.mark.parametrize("seed", range(4))
def test_summaries_of_a_later_day_are_never_read(clinic, seed):
    tables = clinic(seed, patients=20)
    before = features(tables)
    late = pl.col("charttime").dt.date() > ends(tables, "notes").dt.date()
    poisoned = tables["notes"].with_columns(
        pl.when(late).then(pl.lit("Chief Complaint:\npoison")).otherwise("text").alias("text")
    )
    assert int(tables["notes"].select(late.sum()).item()) > 0
    assert features({**tables, "notes": poisoned}).equals(before)
    keep = ExtractConfig(admissions=AdmissionConfig(late_notes="keep"))
    changed = features({**tables, "notes": poisoned}, keep)
    assert changed.filter(pl.col("notes").str.contains("poison")).height > 0
    moved = changed.join(tables["admissions"].select("hadm_id", "dischtime"), on="hadm_id")
    assert (moved["prediction_time"] >= moved["notes_available_at"]).all()
    assert (moved["prediction_time"] > moved["dischtime"]).any()


@pytest.mark.parametrize("seed", range(4))
def test_discharge_diagnoses_and_courses_are_dropped(clinic, seed):
    tables = clinic(seed, patients=20)
    notes = features(tables)["notes"].drop_nulls()
    assert len(notes)
    assert not notes.str.contains("Discharge Diagnosis|Hospital Course|Heart failure").any()
    leaky = ExtractConfig(admissions=AdmissionConfig(sections="all"))
    assert features(tables, leaky)["notes"].str.contains("Discharge Diagnosis").any()


def test_later_admissions_say_nothing_of_earlier_ones(clinic):
    tables = clinic(2, patients=20)
    before = features(tables)
    last = (
        tables["admissions"].sort("admittime").group_by("subject_id").agg(pl.col("hadm_id").last())
    )
    others = before.filter(~pl.col("hadm_id").is_in(last["hadm_id"].implode()))
    poisoned = tables["notes"].with_columns(
        pl.when(pl.col("hadm_id").is_in(last["hadm_id"].implode()))
        .then(pl.lit("Chief Complaint:\npoison"))
        .otherwise("text")
        .alias("text")
    )
    after = features({**tables, "notes": poisoned})
    kept = after.filter(pl.col("hadm_id").is_in(others["hadm_id"].implode()))
    assert kept.equals(others)
    assert others.height
    assert others["notes"].str.contains("Earlier admission:").any()
