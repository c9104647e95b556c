"""Which stay an event belongs to when a patient has two."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import polars as pl
import pytest

from data.extraction import extract_partition
from data.switches import ExtractConfig
from data.tasks import task_spec

if TYPE_CHECKING:
    from collections.abc import Callable

    Tables = dict[str, pl.DataFrame]

HEART_RATE, GLUCOSE = 220045, 50931
AS_FOUND = ExtractConfig(event_to_stay="as_found")


def second_admission(tables: Tables, later: timedelta) -> Tables:
    """The same patient again: admission 71 with stay 701, all times moved by `later`."""
    moved = {"hadm_id": 71, "stay_id": 701}
    both = dict(tables)
    for name in ("admissions", "icustays", "diagnoses"):
        frame = tables[name]
        again = frame.with_columns(
            *(pl.lit(i, dtype=pl.Int64).alias(c) for c, i in moved.items() if c in frame.columns),
            *(pl.col(c) + later for c, kind in frame.schema.items() if kind == pl.Datetime("us")),
        )
        both[name] = pl.concat([frame, again])
    return both


def bins(tables: Tables, config: ExtractConfig) -> dict[int, list[int]]:
    """stay_id -> the bins in which anything was observed."""
    samples = extract_partition(tables, task_spec("mortality"), config).samples
    return {
        stay: sorted({i // 17 for i, seen in enumerate(observed) if seen})
        for stay, observed in samples.select("stay_id", "ehr_observed").rows()
    }


@pytest.fixture
def two_stays(tiny: Callable[..., Tables]) -> Tables:
    glucose = {"item": GLUCOSE, "value": "120", "stay_id": None}
    events = [
        {"hour": 1, "item": HEART_RATE, "value": "70"},
        {"hour": 201, "item": HEART_RATE, "value": "70", "hadm_id": 71, "stay_id": 701},
        # Charted under the first stay, at a time of the second.
        {"hour": 203, "item": HEART_RATE, "value": "70"},
        # A laboratory value of each admission, and one of neither.
        {"hour": 5, **glucose},
        {"hour": 205, "hadm_id": 71, **glucose},
        {"hour": 207, "hadm_id": None, **glucose},
        {"hour": 100, **glucose},
    ]
    return second_admission(tiny(events), timedelta(hours=200))


def test_the_stay_id_decides_and_time_where_there_is_none(two_stays: Tables) -> None:
    assert bins(two_stays, ExtractConfig()) == {700: [0, 4], 701: [0, 4, 6]}


def test_as_found_adds_what_lies_in_a_stays_time_and_needs_an_admission(two_stays: Tables) -> None:
    assert bins(two_stays, AS_FOUND) == {700: [0, 4], 701: [0, 2, 4]}


def test_time_inside_two_stays_belongs_to_neither(tiny: Callable[..., Tables]) -> None:
    events = [
        {"hour": 1, "item": HEART_RATE, "value": "70"},
        {"hour": 25, "item": HEART_RATE, "value": "70", "hadm_id": 71, "stay_id": 701},
        {"hour": 3, "item": GLUCOSE, "value": "120", "stay_id": None},
        {"hour": 30, "item": GLUCOSE, "value": "120", "stay_id": None},
    ]
    overlapping = second_admission(tiny(events), timedelta(hours=20))
    assert bins(overlapping, ExtractConfig()) == {700: [0, 2], 701: [4]}
    assert bins(overlapping, AS_FOUND) == {700: [0, 2, 24, 29], 701: [4, 9]}
