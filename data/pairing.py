"""Which chest X-ray belongs to which ICU stay, and the image samples of the radiology task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from data.flow import FlowStep
from data.schema import SHARD_SCHEMA
from data.sources.canonical import TIME
from data.splits import assign_split

if TYPE_CHECKING:
    from data.switches import ExtractConfig
    from data.tasks import TaskSpec

PAIR_SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    "stay_id": pl.Int64,
    "dicom_id": pl.String,
    "path": pl.String,
    "cxr_available_at": TIME,
    "cxr_labels": pl.List(pl.Float32),
}


@dataclass(frozen=True)
class Paired:
    """At most one image for each stay.

    Attributes:
        images: stay_id, dicom_id, path, cxr_available_at (the study's time) and cxr_labels (14
            float32 of 0 and 1, null where CheXpert has no row); sorted by stay_id.
        flow: Each rule with the images before and after it.
    """

    images: pl.DataFrame
    flow: list[FlowStep]


@dataclass(frozen=True)
class ImageSamples:
    """The samples of the radiology task.

    Attributes:
        samples: The columns of SHARD_SCHEMA but `cxr`, plus `path`; stay, admission and time series
            are null, the prediction time is the study's time. Sorted by (subject_id, dicom_id).
        flow: Each rule with the images before and after it.
    """

    samples: pl.DataFrame
    flow: list[FlowStep]


def pair_images(
    stays: pl.DataFrame, cxr: pl.DataFrame, task: TaskSpec, config: ExtractConfig
) -> Paired:
    """Pair each stay with its latest frontal image (MedFuse and DrFuse).

    An image counts from intime on, both ends included, up to intime plus the task's window, also
    where the stay is shorter, or up to outtime if the task has none. With `cxr_window = stay` it
    counts up to outtime whatever the window, which looks ahead: the published mortality numbers.
    Of images taken at the same time the largest dicom_id wins.

    Args:
        stays: subject_id, stay_id, intime, outtime.
        cxr: The canonical `cxr` table, of these subjects or more.
        task: Its window_hours decides.
        config: `cxr_view` and `cxr_window`.
    """
    flow = []
    frontal = cxr.filter(pl.col("view") == config.cxr_view)
    flow.append(_step(cxr, frontal, "view", f"only {config.cxr_view} images are paired with stays"))

    end = pl.col("outtime")
    if config.cxr_window == "task" and task.window_hours is not None:
        window = pl.duration(microseconds=round(task.window_hours * 3_600_000_000))
        end = pl.col("intime") + window
    spans = stays.select("subject_id", "stay_id", "intime", end.alias("end"))
    of_patients = frontal.join(spans.select("subject_id").unique(), on="subject_id", how="semi")
    flow.append(_step(frontal, of_patients, "cohort", "the image's patient has a stay"))

    inside = of_patients.join(spans, on="subject_id", how="inner").filter(
        pl.col("studytime").is_between("intime", "end", closed="both")
    )
    imaged = inside.unique("dicom_id")
    flow.append(_step(of_patients, imaged, "window", "taken inside the stay's window"))

    latest = inside.sort("stay_id", "studytime", "dicom_id").unique("stay_id", keep="last")
    flow.append(_step(imaged, latest, "latest", "one image a stay, the latest in its window"))
    images = latest.select(
        "stay_id",
        "dicom_id",
        "path",
        pl.col("studytime").alias("cxr_available_at"),
        uncertain_as_negative().alias("cxr_labels"),
    ).sort("stay_id")
    return Paired(images.cast(PAIR_SCHEMA), flow)  # type: ignore[arg-type]


def uncertain_as_negative() -> pl.Expr:
    """CheXpert's uncertain (-1) and blank labels as 0, as in MedFuse's released code."""
    positive = pl.element().fill_null(0.0) == 1.0
    return pl.col("chexpert").list.eval(positive.cast(pl.Float32))


def radiology_samples(
    cxr: pl.DataFrame, config: ExtractConfig, ehr_splits: pl.DataFrame | None = None
) -> ImageSamples:
    """Every labelled image of every view, to pre-train the image encoder.

    A subject has the split it has among the stays. The hash and the lists of `config.split` depend
    on the subject alone and give it without knowing the stays.

    Args:
        cxr: The canonical `cxr` table.
        config: `split`.
        ehr_splits: subject_id and split of stays that were split in another way; they win.

    Raises:
        InputError: A split list is wrong (`assign_split`).
    """
    labelled = cxr.filter(pl.col("chexpert").is_not_null())
    flow = [_step(cxr, labelled, "labelled", "CheXpert labelled the image's study")]
    split = assign_split(labelled["subject_id"], config.split)
    labels = uncertain_as_negative()
    samples = labelled.with_columns(
        split,
        pl.col("studytime").alias("prediction_time"),
        pl.col("studytime").alias("cxr_available_at"),
        labels.alias("cxr_labels"),
        labels.alias("labels"),
    )
    if ehr_splits is not None:
        given = ehr_splits.select("subject_id", pl.col("split").alias("given")).unique()
        samples = samples.join(given, on="subject_id", how="left").with_columns(
            pl.coalesce("given", "split").alias("split")
        )
    schema = image_sample_schema()
    absent = [
        pl.lit(None, dtype=kind).alias(name)
        for name, kind in schema.items()
        if name not in samples.columns
    ]
    columns = [pl.col(name).cast(kind) for name, kind in schema.items()]
    samples = samples.with_columns(absent).select(columns).sort("subject_id", "dicom_id")
    return ImageSamples(samples, flow)


def image_sample_schema() -> dict[str, pl.DataType]:
    """The columns of a sample before its image is read: SHARD_SCHEMA, `path` in place of `cxr`."""
    empty = pl.DataFrame(SHARD_SCHEMA.empty_table())
    schema = {name: kind for name, kind in empty.schema.items() if name != "cxr"}
    return {**schema, "path": pl.String()}


def _step(before: pl.DataFrame, after: pl.DataFrame, rule: str, why: str) -> FlowStep:
    return FlowStep(
        rule=f"cxr {rule}", unit="images", rows_in=before.height, rows_out=after.height, why=why
    )
