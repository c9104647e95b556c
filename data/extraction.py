"""From the typed tables of one subject partition to its samples. Pure: no files, no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl
import pyarrow as pa

from data.admissions import admission_samples
from data.cleaning import clean
from data.cohort import select_stays, with_diagnoses
from data.duplicates import Points, one_per_time
from data.events import events_of_stays, used_events
from data.labels import phenotype_labels
from data.ledger import Ledger
from data.pairing import image_sample_schema, pair_images, radiology_samples
from data.schema import N_CHANNELS
from data.series import EPSILON, bin_count, discretise
from data.sources.canonical import TABLES
from data.sources.meds import canonical_tables
from data.splits import assign_split

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from data.flow import FlowStep, Quarantined
    from data.series import Grid
    from data.switches import ExtractConfig
    from data.tasks import TaskSpec

_US_PER_HOUR: Final = 3_600_000_000
_TOLERANCE_US: Final = round(EPSILON * _US_PER_HOUR)

_MAY_BE_ABSENT: Final = (
    "cxr",
    "icd_dictionary",
    "lab_names",
    "notes",
    "labs",
    "given_splits",
    "meds",
)
_ORDER: Final = ("subject_id", "stay_id", "dicom_id", "hadm_id")
_OF_STAYS: Final = ("icustays", "events")


@dataclass(frozen=True)
class PartitionResult:
    """What one partition gives.

    Attributes:
        samples: The columns of SHARD_SCHEMA but `cxr`, plus `path` of the image (null without).
            Sorted by subject_id, stay_id, dicom_id and hadm_id: independent of the rows' order.
        flow: Each rule in order, also those that removed nothing.
        quarantine: Rows set aside.
        counters: Counted repairs.
        excluded: Rule -> stay_id of the stays that it removed.
    """

    samples: pl.DataFrame
    flow: list[FlowStep]
    quarantine: list[Quarantined] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    excluded: dict[str, list[int]] = field(default_factory=dict)


def extract_partition(
    tables: Mapping[str, pl.DataFrame], task: TaskSpec, config: ExtractConfig
) -> PartitionResult:
    """Extract the samples of one task from all rows of some subjects.

    Args:
        tables: Canonical tables (data.sources.canonical) by name. Columns that a release lacks may
            be absent; `cxr` and `icd_dictionary` may be absent tables.
        task: What is predicted, with the labels that `data.code_lists.labelled_spec` gives it.
        config: The data switches.

    Raises:
        InputError: Two different rows of one key; a dictionary is needed and absent.
    """
    if task.unit == "image":
        images = radiology_samples(_conform(tables, "cxr"), config)
        return PartitionResult(samples=_ordered(images.samples), flow=images.flow)
    ledger = Ledger()
    if task.unit == "admission":
        whole = {name: _conform(tables, name) for name in TABLES if name not in _OF_STAYS}
        if whole["meds"].height:
            whole |= canonical_tables(whole["meds"], config.admissions.meds)
        return _result(admission_samples(whole, task, config, ledger), ledger)
    canonical = {name: _conform(tables, name) for name in TABLES if name in tables}
    stays = eligible_stays(canonical, task, config, ledger)
    rows = known_events(canonical["events"], stays, config, ledger)
    points = one_per_time(clean(rows, config, ledger), config, ledger)
    with_series, grid = _series_of_stays(stays, points, config, ledger)
    samples = _samples(with_series, grid, task, config)
    if "cxr" in task.modalities:
        paired = pair_images(with_series, _conform(tables, "cxr"), task, config)
        ledger.flow.extend(paired.flow)
        samples = samples.join(paired.images, on="stay_id", how="left")
    return _result(samples, ledger)


def _result(samples: pl.DataFrame, ledger: Ledger) -> PartitionResult:
    return PartitionResult(
        samples=_ordered(samples),
        flow=ledger.flow,
        quarantine=ledger.quarantine,
        counters=ledger.counters,
        excluded=ledger.excluded,
    )


def eligible_stays(
    tables: Mapping[str, pl.DataFrame], task: TaskSpec, config: ExtractConfig, ledger: Ledger
) -> pl.DataFrame:
    """All stays of the cohort, with what the task asks of them.

    Stays that are no sample stay in the frame, because events are given to stays of the whole
    cohort: `eligible` tells them apart. The prediction time is intime plus the task's window, or
    outtime; nothing later is used under any preset (where `los` is rounded, as in MIMIC-III, the
    released window reaches seconds beyond outtime: those values are left out).

    Returns:
        STAY_COLUMNS, `phenotypes`, `hours` (the series' length), `prediction_time`, `eligible`.
    """
    stays = select_stays(tables, config, ledger)
    labels = phenotype_labels(tables["diagnoses"], tables.get("icd_dictionary"), config)
    coded = with_diagnoses(stays, labels, ledger)
    hours = pl.col("los") * 24.0
    begins = pl.col("intime")
    if task.window_hours is None:
        length, known = hours, pl.col("outtime")
    else:
        window = pl.duration(microseconds=round(task.window_hours * _US_PER_HOUR))
        length, known = pl.min_horizontal(hours, pl.lit(task.window_hours)), begins + window
    long_enough = ledger.keep(
        coded,
        "long enough",
        "stays",
        (hours >= task.min_los_hours - EPSILON) & (length > 0),
        f"A stay of at least {task.min_los_hours:g} hours.",
    )
    return stays.join(
        coded.select("stay_id", "phenotypes"), on="stay_id", how="left", maintain_order="left"
    ).with_columns(
        length.alias("hours"),
        known.alias("prediction_time"),
        pl.col("stay_id").is_in(long_enough["stay_id"].implode()).alias("eligible"),
    )


def known_events(
    events: pl.DataFrame, stays: pl.DataFrame, config: ExtractConfig, ledger: Ledger
) -> pl.DataFrame:
    """Events inside their stay's window and known at its prediction time.

    Args:
        events: The canonical table.
        stays: From `eligible_stays`.
        config: `availability`, and what data.events reads.
        ledger: Where each rule is noted.

    Returns:
        The columns of `events_of_stays` with `available` (microseconds since intime) and, for the
        duplicate rule that needs it, `subject_has_text`.
    """
    joined = events_of_stays(used_events(events, config, ledger), stays, config, ledger)
    if config.duplicates == "text_maximum":
        joined = joined.with_columns(_subject_has_text(joined, stays))
    stay = joined["stay"].to_numpy()
    available = (
        pl.coalesce("storetime", "charttime")
        if config.availability == "storetime"
        else pl.col("charttime")
    )
    timed = joined.with_columns(
        ((available - pl.col("charttime")).dt.total_microseconds() + pl.col("offset")).alias(
            "available"
        ),
        _per_row("limit", _limits(stays), stay),
        _per_row("horizon", _horizons(stays), stay),
        _per_row("eligible", stays["eligible"].to_numpy(), stay),
    )
    return ledger.keep_each(
        timed,
        "events",
        (
            ("stay is a sample's", pl.col("eligible"), "Stays that the task leaves out."),
            (
                "inside the window",
                pl.col("offset").is_between(-_TOLERANCE_US, "limit", closed="none"),
                "From intime to the end of the stay or of the task's window.",
            ),
            (
                "known at the prediction time",
                pl.col("available") <= pl.col("horizon"),
                "Stored (or charted) after the prediction time: not known then.",
            ),
        ),
    ).drop("limit", "horizon", "eligible", "charttime")


def _per_row(name: str, by_stay: NDArray[np.generic], stay: NDArray[np.uint32]) -> pl.Series:
    return pl.Series(name, by_stay[stay])


def _limits(stays: pl.DataFrame) -> NDArray[np.int64]:
    """[S] offsets below this are inside the window."""
    return np.floor(stays["hours"].to_numpy() * _US_PER_HOUR).astype(np.int64) + _TOLERANCE_US


def _horizons(stays: pl.DataFrame) -> NDArray[np.int64]:
    """[S] microseconds from intime to the prediction time."""
    return (stays["prediction_time"] - stays["intime"]).dt.total_microseconds().to_numpy()


def _subject_has_text(rows: pl.DataFrame, stays: pl.DataFrame) -> pl.Series:
    """Per row: pandas reads the subject's values as text, because one of them is no number."""
    is_text = rows["value"].cast(pl.Float64, strict=False).is_null()
    textual = stays["subject_id"][rows["stay"].filter(is_text).unique()].unique()
    by_stay = stays["subject_id"].is_in(textual.implode()).to_numpy()
    return _per_row("subject_has_text", by_stay, rows["stay"].to_numpy())


def _series_of_stays(
    stays: pl.DataFrame, points: Points, config: ExtractConfig, ledger: Ledger
) -> tuple[pl.DataFrame, Grid]:
    """The stays that have a value, and their regular series in the same order."""
    present, compact = np.unique(points.stay, return_inverse=True)
    ledger.step(
        "has an event",
        "stays",
        (int(stays["eligible"].sum()), len(present)),
        "At least one readable event inside the window.",
    )
    chosen = stays[present]
    eligible = stays.filter("eligible")["stay_id"]
    ledger.exclude("has an event", eligible, chosen["stay_id"])
    steps = bin_count(chosen["hours"].to_numpy(), config.timestep_hours)
    return chosen, discretise(replace(points, stay=compact), steps, config.timestep_hours)


def _samples(
    stays: pl.DataFrame, grid: Grid, task: TaskSpec, config: ExtractConfig
) -> pl.DataFrame:
    """One row a stay, without images."""
    labels = (
        pl.concat_list(pl.col("died").cast(pl.Float32))
        if task.kind == "binary"
        else pl.col("phenotypes")
    )
    return stays.select(
        "subject_id",
        "hadm_id",
        "stay_id",
        _prediction_time(task, config).alias("prediction_time"),
        assign_split(stays["subject_id"], config.split).alias("split"),
        "sex",
        pl.col("age").cast(pl.Float32),
        _lists(grid.values, grid.first, "ehr"),
        _lists(grid.observed, grid.first, "ehr_observed"),
        (pl.col("intime") + pl.Series(grid.available).cast(pl.Duration("us"))).alias(
            "ehr_available_at"
        ),
        labels.alias("labels"),
    )


def _prediction_time(task: TaskSpec, config: ExtractConfig) -> pl.Expr:
    """With `cxr_window = stay` the image is only known at outtime: no earlier time is claimed."""
    looks_ahead = config.cxr_window == "stay" and "cxr" in task.modalities
    return (
        pl.max_horizontal("prediction_time", "outtime")
        if looks_ahead
        else pl.col("prediction_time")
    )


def _lists(
    cells: NDArray[np.float32] | NDArray[np.uint8], first: NDArray[np.int64], name: str
) -> pl.Series:
    """The rows of each stay as one list, row by row."""
    lists = pa.LargeListArray.from_arrays(pa.array(first * N_CHANNELS), pa.array(cells.reshape(-1)))
    return pl.Series(name, lists)


def _conform(tables: Mapping[str, pl.DataFrame], name: str) -> pl.DataFrame:
    """The table with every canonical column; those that a release lacks are null."""
    schema = TABLES[name]
    if name not in tables and name in _MAY_BE_ABSENT:
        return pl.DataFrame(schema=schema)
    frame = tables[name]
    missing = [
        pl.lit(None, dtype=kind).alias(column)
        for column, kind in schema.items()
        if column not in frame.columns
    ]
    return frame.with_columns(missing).select(schema.keys())


def _ordered(samples: pl.DataFrame) -> pl.DataFrame:
    schema = image_sample_schema()
    missing = [
        pl.lit(None, dtype=kind).alias(column)
        for column, kind in schema.items()
        if column not in samples.columns
    ]
    columns = [pl.col(column).cast(kind) for column, kind in schema.items()]
    return samples.with_columns(missing).select(columns).sort(*_ORDER)
