"""An admission's laboratory results: one number an item, and the abnormal ones as a sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import polars as pl

from data.lab_text import Result, write_lab_text
from data.lab_units import NORMAL, conversion, unit_name

if TYPE_CHECKING:
    from data.ledger import Ledger
    from data.switches import AdmissionConfig, ExtractConfig

SCHEMA: Final = {
    "hadm_id": pl.Int64(),
    "lab_items": pl.List(pl.String()),
    "labs": pl.List(pl.Float32()),
    "lab_units": pl.List(pl.String()),
    "lab_text": pl.String(),
    "labs_available_at": pl.Datetime("us"),
}
_WINDOWS: Final = {"24h": pl.duration(hours=24), "48h": pl.duration(hours=48)}
_SENTENCES: Final[dict[str, pl.DataType]] = {
    "hadm_id": pl.Int64(),
    "lab_text": pl.String(),
    "text_available": pl.Datetime("us"),
}
_LIMITS: Final[dict[str, pl.DataType]] = {
    "__test": pl.String(),
    "__unit": pl.String(),
    "low": pl.Float64(),
    "high": pl.Float64(),
}
_LARGEST: Final = 3e38
"""A float32 holds it."""


def lab_matrix(
    labs: pl.DataFrame,
    names: pl.DataFrame,
    admissions: pl.DataFrame,
    config: ExtractConfig,
    ledger: Ledger,
) -> pl.DataFrame:
    """The results of each admission that has any number.

    Args:
        labs: The canonical table.
        names: item, name.
        admissions: subject_id, hadm_id, admittime, prediction_time.
        config: `availability`, and of `admissions` `lab_window`, `lab_value`, `lab_units`,
            `abnormal`.
        ledger: Where each rule is noted.

    Returns:
        SCHEMA; items of a row are sorted and unique.
    """
    settings = config.admissions
    known = _known(_of_admissions(labs, admissions, ledger), config, ledger)
    named = known.join(
        names.unique(subset="item", keep="first", maintain_order=True),
        on="item",
        how="left",
        maintain_order="left",
    ).with_columns(pl.coalesce("name", "item").alias("name"))
    converted = _converted(named, settings, ledger).sort(
        "hadm_id", "charttime", "item", "available", "valuenum", "value", nulls_last=False
    )
    numbers = ledger.keep(
        converted,
        "lab result is a number",
        "lab results",
        pl.col("number").is_finite() & (pl.col("number").abs() < _LARGEST),
        "Only numbers enter the matrix.",
    )
    last = pl.col("number").last()
    value = last
    if settings.lab_value == "mean":
        value = pl.col("number").filter(pl.col("unit") == pl.col("unit").last()).mean()
    by_item = (
        numbers.group_by("hadm_id", "item", maintain_order=True)
        .agg(value.alias("number"), pl.col("unit").last(), pl.col("available").max())
        .sort("hadm_id", "item")
    )
    rows = by_item.group_by("hadm_id", maintain_order=True).agg(
        pl.col("item").alias("lab_items"),
        pl.col("number").cast(pl.Float32).alias("labs"),
        pl.col("unit").alias("lab_units"),
        pl.col("available").max(),
    )
    sentences = _sentences(converted, settings, ledger)
    joined = rows.join(sentences, on="hadm_id", how="left", maintain_order="left")
    latest = pl.max_horizontal("available", "text_available").alias("labs_available_at")
    return joined.with_columns(latest).select(
        pl.col(name).cast(kind) for name, kind in SCHEMA.items()
    )


def _of_admissions(labs: pl.DataFrame, admissions: pl.DataFrame, ledger: Ledger) -> pl.DataFrame:
    """Results with their admission: by its id, else by a time inside one of the patient's."""
    times = admissions.select("subject_id", "hadm_id", "admittime", "prediction_time", "dischtime")
    by_id = labs.filter(pl.col("hadm_id").is_not_null()).join(
        times.drop("subject_id"), on="hadm_id"
    )
    loose = labs.filter(pl.col("hadm_id").is_null()).drop("hadm_id").with_row_index("__row")
    inside = loose.join(times, on="subject_id").filter(
        pl.col("charttime").is_between("admittime", "dischtime")
    )
    inside = inside.filter(pl.len().over("__row") == 1).drop("__row")
    ledger.count("lab results given to an admission by their time", inside.height)
    joined = pl.concat([by_id, inside.select(by_id.columns)])
    ledger.step(
        "lab result of an admission of the cohort",
        "lab results",
        (labs.height, joined.height),
        "By hadm_id, else by a time inside exactly one admission.",
    )
    return joined


def _known(rows: pl.DataFrame, config: ExtractConfig, ledger: Ledger) -> pl.DataFrame:
    """Results inside the window, known at the prediction time; with `available`."""
    times = ("storetime", "charttime") if config.availability == "storetime" else ("charttime",)
    window = config.admissions.lab_window
    inside = pl.col("charttime") <= pl.col("prediction_time")
    if window != "stay":
        inside &= pl.col("charttime") <= pl.col("admittime") + _WINDOWS[window]
    return ledger.keep_each(
        rows.with_columns(pl.coalesce(*times).alias("available")),
        "lab results",
        (
            ("lab result inside the window", inside, f"lab_window is {window}."),
            (
                "lab result known at the prediction time",
                pl.col("available") <= pl.col("prediction_time"),
                "Stored (or charted) after the prediction time: not known then.",
            ),
        ),
    )


def _converted(rows: pl.DataFrame, config: AdmissionConfig, ledger: Ledger) -> pl.DataFrame:
    """With `number` and `unit` in the unit of the test, and `found_unit` as recorded."""
    pairs = rows.select("name", "unit").unique().rows()
    mapped = []
    for name, unit in pairs:
        target, factor = (
            conversion(name, unit) if config.lab_units == "convert" else (unit_name(unit), 1.0)
        )
        mapped.append((name, unit, target, factor))
    schema = {"name": pl.String, "unit": pl.String, "target": pl.String, "factor": pl.Float64}
    table = pl.DataFrame(mapped, schema, orient="row")
    joined = rows.join(table, on=["name", "unit"], how="left", nulls_equal=True)
    ledger.count("lab results converted", int((joined["factor"] != 1.0).sum()))
    return joined.with_columns(
        (pl.col("valuenum") * pl.col("factor")).alias("number"),
        pl.col("unit").fill_null("").alias("found_unit"),
        pl.col("target").alias("unit"),
    )


def _sentences(rows: pl.DataFrame, config: AdmissionConfig, ledger: Ledger) -> pl.DataFrame:
    """hadm_id, lab_text, text_available: the last abnormal result of each item, in time's order."""
    if config.abnormal == "flag":
        abnormal = pl.col("flag").str.strip_chars().str.to_lowercase() == "abnormal"
    else:
        limits = [(name, unit, low, high) for name, (unit, low, high) in NORMAL.items()]
        rows = rows.with_columns(pl.col("name").str.to_lowercase().alias("__test")).join(
            pl.DataFrame(limits, _LIMITS, orient="row"),
            left_on=["__test", "unit"],
            right_on=["__test", "__unit"],
            how="left",
            maintain_order="left",
        )
        abnormal = ~pl.col("number").is_between("low", "high")
        ledger.count("lab results of tests without a common range", rows["low"].null_count())
    says = pl.col("value").str.contains(r"[0-9A-Za-z]")
    shown = pl.coalesce(pl.when(says).then("value"), pl.col("valuenum").cast(pl.String))
    last = (
        rows.filter(abnormal)
        .with_columns(shown.alias("shown"))
        .drop_nulls("shown")
        .group_by("hadm_id", "item", maintain_order=True)
        .agg(pl.col("name", "shown", "found_unit", "charttime", "available").last())
        .sort("hadm_id", "charttime", "name", "item")
    )
    found = [
        (
            key[0],
            write_lab_text(
                [Result(*row) for row in part.select("name", "shown", "found_unit").rows()]
            ),
            part["available"].max(),
        )
        for key, part in last.group_by("hadm_id", maintain_order=True)
    ]
    return pl.DataFrame(found, _SENTENCES, orient="row")
