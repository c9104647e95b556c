"""The items of the 17 variables, and which stay an event belongs to."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import polars as pl

from data.schema import CHANNELS

if TYPE_CHECKING:
    from data.ledger import Ledger
    from data.switches import ExtractConfig

_CHANNEL_INDEX: Final = {channel.name: v for v, channel in enumerate(CHANNELS)}


@dataclass(frozen=True)
class Item:
    """One MIMIC item that carries a benchmark variable.

    Attributes:
        itemid: MIMIC's id.
        channel: Index into CHANNELS.
        label: MIMIC's label; the released code reads units from it alone.
        source: chart, lab or output.
        system: carevue (MIMIC-III only), metavision or lab.
        unit: What the label says its numbers are in (F, C, in, cm, lb, oz, kg), else empty.
        derived: Used only where ExtractConfig.derive is on (not in the released item map).
    """

    itemid: int
    channel: int
    label: str
    source: str
    system: str
    unit: str
    derived: bool


def _load_items() -> dict[int, Item]:
    path = Path(__file__).parent / "resources" / "items.csv"
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    return {
        int(row["itemid"]): Item(
            itemid=int(row["itemid"]),
            channel=_CHANNEL_INDEX[row["channel"]],
            label=row["label"],
            source=row["source"],
            system=row["system"],
            unit=row["unit"],
            derived=row["status"] == "derived",
        )
        for row in csv.DictReader(lines)
    }


ITEMS: Final[dict[int, Item]] = _load_items()
"""itemid -> Item: the 114 `ready` ids of the benchmark and two of capillary refill."""


def item_ids(release: str, source: str | None = None) -> frozenset[int]:
    """The items to keep when reading a release; all else can be dropped while scanning.

    Args:
        release: As detected, e.g. `mimic-iii-1.4`; only MIMIC-III has CareVue items.
        source: Of one table only: chart, lab or output.
    """
    carevue = release.startswith("mimic-iii")
    return frozenset(
        item.itemid
        for item in ITEMS.values()
        if (carevue or item.system != "carevue") and source in (None, item.source)
    )


_KEPT: Final = (
    "itemid",
    "charttime",
    "storetime",
    "value",
    "valueuom",
    "source",
    "row",
)
_LIMITS: Final = ("intime", "dob", "last_plausible")


def used_events(events: pl.DataFrame, config: ExtractConfig, ledger: Ledger) -> pl.DataFrame:
    """The rows that could become a value: item, no error flag, a time and a text."""
    wanted = [item.itemid for item in ITEMS.values() if config.derive or not item.derived]
    error = pl.col("error").fill_null(value=False)
    return ledger.keep_each(
        events,
        "events",
        (
            (
                "item of a variable",
                pl.col("itemid").is_in(wanted),
                "The benchmark's 114 items, and with `derive` two of capillary refill.",
            ),
            (
                "no error flag",
                ~error if config.error_rows == "drop" else pl.lit(value=True),
                "MIMIC-III marks rows as entered in error.",
            ),
            ("time known", pl.col("charttime").is_not_null(), "Rows without charttime."),
            (
                "value known",
                pl.col("value").str.len_bytes() > 0,
                "The text column is what is read, in the released code too; empty is missing.",
            ),
        ),
    )


def events_of_stays(
    events: pl.DataFrame, stays: pl.DataFrame, config: ExtractConfig, ledger: Ledger
) -> pl.DataFrame:
    """Give each event its stay.

    `as_found` is the released rule: rows without hadm_id, of other admissions, or whose stay id
    disagrees with the admission's stay are dropped; then a stay has the rows with its id and
    those of the same subject between its intime and outtime.
    `stay_id_then_time`: the stay id decides; a row without one goes to the one stay of the subject
    whose time it lies in, and nowhere if that is none or not unique. Rows before birth, or later
    than death or discharge by more than the margin, are quarantined.

    Args:
        events: From `used_events`.
        stays: From `data.cohort.select_stays`.
        config: `event_to_stay`, `late_margin_hours`.
        ledger: Where rules are noted.

    Returns:
        `stay` (UInt32, the row in `stays`), `offset` (Int64, microseconds since intime), and the
        columns of the event that the later rules need.
    """
    known = stays.with_row_index("stay").with_columns(
        _last_plausible(config).alias("last_plausible")
    )
    join = _joined_as_found if config.event_to_stay == "as_found" else _joined_by_time
    joined = join(events, known).with_columns(
        (pl.col("charttime") - pl.col("intime")).dt.total_microseconds().alias("offset")
    )
    ledger.step(
        "event belongs to a stay",
        "events",
        (events.height, joined.height),
        "By stay id, else by time (or as the released code joins them).",
    )
    if config.event_to_stay == "as_found":
        return joined.drop(_LIMITS)
    plausible = _plausible(joined, ledger)
    return plausible.drop(_LIMITS)


def _last_plausible(config: ExtractConfig) -> pl.Expr:
    """Discharge or death, whichever is first, and the margin; a date of death is a whole day."""
    died = pl.coalesce("deathtime", pl.col("dod") + pl.duration(days=1))
    return pl.min_horizontal("dischtime", died) + pl.duration(
        seconds=round(config.late_margin_hours * 3600)
    )


def _joined_by_time(events: pl.DataFrame, stays: pl.DataFrame) -> pl.DataFrame:
    chosen = stays.select("stay", "subject_id", "stay_id", "outtime", *_LIMITS)
    blank = pl.col("stay_id").is_null()
    columns = ("stay", *_KEPT, *_LIMITS)
    named = events.filter(~blank).join(chosen, on=["stay_id", "subject_id"]).select(columns)
    timed = (
        events.filter(blank)
        .with_row_index("place")
        .join(chosen.drop("stay_id"), on="subject_id")
        .filter(pl.col("charttime").is_between("intime", "outtime"))
        .filter(pl.col("place").is_unique())
        .select(columns)
    )
    return pl.concat([named, timed])


def _joined_as_found(events: pl.DataFrame, stays: pl.DataFrame) -> pl.DataFrame:
    chosen = stays.select(
        "stay", "subject_id", "hadm_id", "outtime", *_LIMITS, stay_of_admission="stay_id"
    )
    columns = ("stay", *_KEPT, *_LIMITS)
    own = (
        events.filter(pl.col("hadm_id").is_not_null())
        .join(chosen, on=["hadm_id", "subject_id"])
        .filter(
            pl.col("stay_id").fill_null(pl.col("stay_of_admission")) == pl.col("stay_of_admission")
        )
    )
    several = chosen.filter(pl.col("subject_id").is_duplicated()).drop("hadm_id")
    others = (
        own.select("subject_id", *_KEPT, own_stay="stay")
        .join(several, on="subject_id")
        .filter(pl.col("stay") != pl.col("own_stay"))
        .filter(pl.col("charttime").is_between("intime", "outtime"))
    )
    return pl.concat([own.select(columns), others.select(columns)])


def _plausible(joined: pl.DataFrame, ledger: Ledger) -> pl.DataFrame:
    unborn = (pl.col("charttime") < pl.col("dob")).fill_null(value=False)
    late = (pl.col("charttime") > pl.col("last_plausible")).fill_null(value=False)
    for reason, wrong in (
        ("before birth", unborn),
        ("later than death or discharge by more than the margin", late & ~unborn),
    ):
        rows = joined.filter(wrong).sort("source", "row")
        places = rows.select(pl.format("{} row {}", "source", "row")).to_series()
        ledger.set_aside("events", reason, rows.height, places)
    return ledger.keep(
        joined,
        "plausible time",
        "events",
        ~(unborn | late),
        "Rows before birth, or after death or discharge by more than the margin, are quarantined.",
    )
