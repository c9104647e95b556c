"""Nothing after the prediction time reaches a feature, from any table; what lies before does."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from data.extraction import extract_partition
from data.switches import ExtractConfig
from data.tasks import task_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Tables = Mapping[str, pl.DataFrame]
    Change = Callable[[Tables], dict[str, pl.DataFrame]]

FEATURES = [
    "stay_id",
    "prediction_time",
    "age",
    "sex",
    "ehr",
    "ehr_observed",
    "ehr_available_at",
    "dicom_id",
    "path",
    "cxr_available_at",
    "cxr_labels",
]
WINDOW = timedelta(hours=48)
LONG = timedelta(days=400)


def with_prediction(tables: Tables, frame: pl.DataFrame) -> pl.DataFrame:
    """The rows with `predicted`: 48 h after the first stay of their admission, or of anything."""
    stays = tables["icustays"]
    by_stay = stays.select("stay_id", of_stay=pl.col("intime") + WINDOW)
    by_admission = stays.group_by("hadm_id").agg(of_admission=pl.col("intime").max() + WINDOW)
    if "stay_id" in frame.columns:
        joined = frame.join(by_stay, on="stay_id", how="left", maintain_order="left")
        known = pl.coalesce("of_stay", "of_admission")
    else:
        joined, known = frame, pl.col("of_admission")
    joined = joined.join(by_admission, on="hadm_id", how="left", maintain_order="left")
    return joined.with_columns(known.alias("predicted")).drop(
        "of_admission", "of_stay", strict=False
    )


def edit(table: str, condition: pl.Expr, **columns: pl.Expr) -> Change:
    """Overwrite columns of one table where `condition` (it may use `predicted`) holds."""

    def change(tables: Tables) -> dict[str, pl.DataFrame]:
        frame = tables[table]
        marked = with_prediction(tables, frame) if "hadm_id" in frame.columns else frame
        hit = condition.fill_null(value=False)
        assert marked.filter(hit).height > 0
        edited = marked.with_columns(
            pl.when(hit).then(new).otherwise(pl.col(name)).alias(name)
            for name, new in columns.items()
        )
        return {**tables, table: edited.select(frame.columns)}

    return change


def after_last_stay(tables: Tables) -> dict[str, pl.DataFrame]:
    """Move every death that follows all of a patient's prediction times, by a month."""
    last = tables["icustays"].group_by("subject_id").agg(last=pl.col("outtime").max() + WINDOW)
    patients = tables["patients"].join(last, on="subject_id", how="left", maintain_order="left")
    late = (pl.col("dod") > pl.col("last")).fill_null(value=False)
    assert patients.filter(late).height > 0
    moved = pl.when(late).then(pl.col("dod") + timedelta(days=30)).otherwise("dod").alias("dod")
    return {**tables, "patients": patients.with_columns(moved).drop("last")}


predicted = pl.col("predicted")
charted, stored = pl.col("charttime"), pl.col("storetime")
AFTER: dict[str, Change] = {
    "event values": edit("events", charted > predicted, value=pl.lit("66")),
    "event items": edit("events", charted > predicted, itemid=pl.lit(220045)),
    "event units": edit("events", charted > predicted, valueuom=pl.lit("lb")),
    "event times": edit("events", charted > predicted, charttime=charted + timedelta(hours=3)),
    "events gone": edit("events", charted > predicted, value=pl.lit(None)),
    "values stored late": edit("events", stored > predicted, value=pl.lit("66")),
    "late storetimes": edit("events", stored > predicted, storetime=stored + LONG),
    "late storetimes of early events": edit(
        "events", (stored > predicted) & (charted <= predicted), error=pl.lit(value=True)
    ),
    "discharge": edit(
        "admissions", pl.col("dischtime") > predicted, dischtime=pl.col("dischtime") + LONG
    ),
    "time of death": edit(
        "admissions", pl.col("deathtime") > predicted, deathtime=pl.col("deathtime") + LONG
    ),
    "time of death gone": edit(
        "admissions", pl.col("deathtime") > predicted, deathtime=pl.lit(None)
    ),
    "date of death": after_last_stay,
    "end of stay": edit(
        "icustays",
        # Only a patient's last stay: an earlier one would come to lie over the next.
        (pl.col("outtime") > predicted)
        & (pl.col("intime") == pl.col("intime").max().over("subject_id")),
        outtime=pl.col("outtime") + LONG,
        los=pl.col("los") + LONG.days,
    ),
    "diagnosis codes": edit("diagnoses", pl.col("seq_num") > 0, icd_code=pl.lit("4019")),
    "dictionary": edit("icd_dictionary", pl.col("icd_version") == 9, icd_version=pl.lit(10)),
    "late images": edit(
        "cxr", pl.col("dicom_id").str.contains("-49-"), path=pl.lit("x"), chexpert=pl.lit(None)
    ),
    "late images moved": edit(
        "cxr",
        pl.col("dicom_id").str.contains("-49-"),
        studytime=pl.col("studytime") + timedelta(minutes=30),
    ),
}
BEFORE: dict[str, Change] = {
    "event values": edit("events", charted <= predicted, value=pl.lit("66")),
    "event units": edit(
        "events", (charted <= predicted) & (pl.col("itemid") == 226531), valueuom=pl.lit("kg")
    ),
    "event times": edit(
        "events",
        (charted <= predicted) & (charted > predicted - timedelta(hours=20)),
        charttime=charted - timedelta(hours=20),
        storetime=stored - timedelta(hours=20),
    ),
    "early values stored late": edit(
        "events",
        (charted <= predicted) & (charted > predicted - timedelta(hours=2)),
        storetime=predicted + timedelta(minutes=1),
    ),
    "late values stored early": edit(
        "events", (stored > predicted) & (charted <= predicted), storetime=charted
    ),
    "error flags": edit("events", charted <= predicted, error=pl.lit(value=True)),
    "date of birth": edit("patients", pl.col("dob").is_not_null(), dob=pl.col("dob") + LONG),
    "sex": edit("patients", pl.col("sex") == "F", sex=pl.lit("M")),
    "death before the events": edit(
        "admissions", pl.col("deathtime").is_not_null(), deathtime=pl.col("admittime") - LONG
    ),
    "early images": edit("cxr", pl.col("dicom_id").str.contains("-47-"), path=pl.lit("x")),
    "late images moved early": edit(
        "cxr",
        pl.col("dicom_id").str.contains("-49-"),
        studytime=pl.col("studytime") - timedelta(hours=1.5),
    ),
    "labels of early images": edit(
        "cxr", pl.col("dicom_id").str.contains("-47-"), chexpert=pl.lit(None)
    ),
}


@pytest.fixture(scope="module")
def hospital(
    demo_tables: Callable[[str], Tables], with_images: Callable[[Tables], dict[str, pl.DataFrame]]
) -> dict[str, pl.DataFrame]:
    """The MIMIC-III demo, which has times of storage, with an invented index of images."""
    return with_images(demo_tables("iii"))


def features(tables: Tables) -> pl.DataFrame:
    result = extract_partition(tables, task_spec("mortality"), ExtractConfig())
    return result.samples.select(FEATURES)


@pytest.fixture(scope="module")
def untouched(hospital: Tables) -> pl.DataFrame:
    samples = features(hospital)
    assert samples.height > 50
    assert samples["dicom_id"].str.contains("-47-").sum() > 50
    return samples


@pytest.mark.parametrize("name", AFTER)
def test_a_change_after_the_prediction_time_reaches_no_feature(
    name: str, hospital: Tables, untouched: pl.DataFrame
) -> None:
    assert_frame_equal(features(AFTER[name](hospital)), untouched, check_exact=True)


@pytest.mark.parametrize("name", BEFORE)
def test_a_change_before_the_prediction_time_reaches_the_features(
    name: str, hospital: Tables, untouched: pl.DataFrame
) -> None:
    assert not features(BEFORE[name](hospital)).equals(untouched)


@pytest.mark.parametrize("task", ["mortality", "phenotyping", "phenotyping_48h"])
@pytest.mark.parametrize("release", ["iii", "iv"])
@pytest.mark.parametrize("preset", ["corrected", "code"])
def test_no_sample_uses_what_was_known_later(
    task: str,
    release: str,
    preset: str,
    demo_tables: Callable[[str], Tables],
    with_images: Callable[[Tables], dict[str, pl.DataFrame]],
    code_config: ExtractConfig,
) -> None:
    config = code_config if preset == "code" else ExtractConfig()
    samples = extract_partition(with_images(demo_tables(release)), task_spec(task), config).samples
    for known in ("ehr_available_at", "cxr_available_at"):
        present = samples.filter(pl.col(known).is_not_null())
        assert present.height > 0
        assert (present[known] <= present["prediction_time"]).all()
