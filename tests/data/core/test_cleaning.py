"""What a text becomes: numbers, units, levels, ranges, and which of several values wins."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
import pytest

from data.cleaning import RANGES
from data.duplicates import SCORES
from data.events import ITEMS, item_ids
from data.extraction import extract_partition
from data.schema import CHANNELS, CONTINUOUS
from data.switches import ExtractConfig
from data.tasks import task_spec

if TYPE_CHECKING:
    from collections.abc import Callable

    import polars as pl

    Tiny = Callable[..., dict[str, pl.DataFrame]]

KEEP = ExtractConfig(outliers="keep")
AS_FOUND = ExtractConfig(outliers="keep", units="as_found")
CODE_RULE = ExtractConfig(duplicates="text_maximum")
NAMES = [channel.name for channel in CHANNELS]


def values_of(tables: dict[str, pl.DataFrame], config: ExtractConfig, channel: int) -> list[float]:
    """The observed values of a channel, bin after bin."""
    samples = extract_partition(tables, task_spec("mortality"), config).samples
    if samples.is_empty():
        return []
    values = np.asarray(samples["ehr"].to_list()[0]).reshape(-1, 17)[:, channel]
    seen = np.asarray(samples["ehr_observed"].to_list()[0]).reshape(-1, 17)[:, channel]
    return [float(value) for value in values[seen == 1]]


@pytest.mark.parametrize(
    ("item", "text", "unit", "read", "as_found"),
    [
        (223761, "98.6", "°F", 37.0, 37.0),
        (223761, "78.9", "°F", 26.0556, 78.9),
        (223761, "78.9", None, 26.0556, 78.9),
        (223762, "37", "°C", 37.0, 37.0),
        (223762, "98.6", "?F", 37.0, 37.0),
        (223762, "98.6", "°C", 98.6, 37.0),
        (223762, "98.6", None, 37.0, 37.0),
        (678, "70", "Deg. F", 21.1111, 70.0),
        (226707, "70", "Inch", 178.0, 70.0),
        (226707, "70", None, 178.0, 70.0),
        (226707, "178", "cm", 178.0, 178.0),
        (226730, "178", "cm", 178.0, 178.0),
        (226730, "70", "inches", 178.0, 70.0),
        (1394, "70", None, 178.0, 178.0),
        (226531, "150", None, 68.0388, 68.0388),
        (226531, "68", "kg", 68.0, 30.844256),
        (224639, "150", "lb", 68.0388, 150.0),
        (224639, "68", "kg", 68.0, 68.0),
        (3582, "2400", None, 68.0388, 68.0388),
        (763, "2400", "oz", 68.0388, 2400.0),
        (223835, "40", None, 0.4, 0.4),
        (223835, "0.4", None, 0.4, 0.004),
        (189, "90", "torr", 90.0, 0.9),
        (189, ".5", "torr", 0.5, 0.005),
        (727, "35", "decFrc", 0.35, 0.35),
        (220277, "0.97", "%", 97.0, 97.0),
        (220277, "97", "%", 97.0, 97.0),
        (220045, " 88 ", None, 88.0, 88.0),
    ],
)
def test_units(
    item: int, text: str, unit: str | None, read: float, as_found: float, tiny: Tiny
) -> None:
    tables = tiny([{"hour": 1, "item": item, "value": text, "valueuom": unit}])
    channel = ITEMS[item].channel
    assert values_of(tables, KEEP, channel) == [pytest.approx(read, rel=1e-5)]
    assert values_of(tables, AS_FOUND, channel) == [pytest.approx(as_found, rel=1e-5)]


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (220045, "ERROR"),
        (220045, "nan"),
        (220045, "inf"),
        (220045, "1_0"),
        (220621, ">500"),
        (220621, "-5"),
        (50931, "GREATER THAN 500"),
        (50820, "___"),
        (220050, "120/"),
        (220045, "120/80"),
        (223761, ">100"),
        (220739, "spontaneously"),
        (223900, "1"),
        (198, "2"),
        (198, "14.5"),
        (223951, "Cool"),
    ],
)
def test_text_that_says_nothing_is_missing_and_counted(item: int, text: str, tiny: Tiny) -> None:
    tables = tiny([{"hour": 1, "item": item, "value": text}])
    result = extract_partition(tables, task_spec("mortality"), KEEP)
    assert result.samples.is_empty()
    read = next(step for step in result.flow if step.rule == "value can be read")
    assert (read.rows_in, read.rows_out) == (1, 0)
    counted = (
        "text that is no number"
        if ITEMS[item].channel in CONTINUOUS
        else ("text that is no known level")
    )
    assert result.counters[counted] == 1


@pytest.mark.parametrize(("item", "value"), [(220050, 120.0), (220051, 80.0)])
def test_a_pair_of_pressures_is_split(item: int, value: float, tiny: Tiny) -> None:
    tables = tiny([{"hour": 1, "item": item, "value": "120/80"}])
    assert values_of(tables, KEEP, ITEMS[item].channel) == [value]


@pytest.mark.parametrize("name", RANGES)
def test_outside_the_outlier_range_is_missing_else_clipped(name: str, tiny: Tiny) -> None:
    outlier_low, low, high, outlier_high = RANGES[name]
    channel = NAMES.index(name)
    item = next(
        item.itemid
        for item in ITEMS.values()
        if item.channel == channel and item.unit in ("", "C", "cm", "kg")
    )
    unit = {"Temperature": "C", "Height": "cm", "Weight": "kg", NAMES[2]: "torr"}.get(name)

    def clipped(number: float) -> list[float]:
        event = {"hour": 1, "item": item, "value": f"{number:.6f}", "valueuom": unit}
        return values_of(tiny([event]), ExtractConfig(), channel)

    assert clipped(outlier_high * 1.001) == []
    assert clipped(outlier_high) == [pytest.approx(high)]
    assert clipped((low + high) / 2) == [pytest.approx((low + high) / 2)]
    if outlier_low > 0:
        assert clipped(outlier_low * 0.999) == []
        assert clipped(outlier_low) == [pytest.approx(low)]


@pytest.mark.parametrize(
    ("rows", "later_stored", "text_maximum"),
    [
        ([("98", None), ("102", None)], 100.0, 98.0),
        ([("98", 30), ("102", 20)], 98.0, 98.0),
        ([("98", 20), ("102", 30)], 102.0, 98.0),
        ([("98", 20), ("102", None)], 98.0, 98.0),
        ([("90", 20), ("98", 30), ("102", 30)], 100.0, 98.0),
    ],
)
def test_two_heart_rates_at_one_time(
    rows: list[tuple[str, int | None]], later_stored: float, text_maximum: float, tiny: Tiny
) -> None:
    events: list[dict[str, object]] = [{"hour": 1, "item": 220739, "value": "None"}]
    events += [
        {
            "hour": 1,
            "item": 220045,
            "value": text,
            "storetime": day and datetime(2150, 3, 11, 0, day),  # noqa: DTZ001
        }
        for text, day in rows
    ]
    channel = NAMES.index("Heart Rate")
    assert values_of(tiny(events), ExtractConfig(), channel) == [later_stored]
    assert values_of(tiny(events), CODE_RULE, channel) == [text_maximum]
    numbers_only = values_of(tiny(events[1:]), CODE_RULE, channel)
    assert numbers_only == [max(float(text) for text, _ in rows)]


def test_cleaned_channels_take_the_largest_number_in_the_released_sort(tiny: Tiny) -> None:
    events = [
        {"hour": 1, "item": 220739, "value": "None"},
        {"hour": 1, "item": 220050, "value": "98"},
        {"hour": 1, "item": 220179, "value": "102"},
    ]
    assert values_of(tiny(events), CODE_RULE, NAMES.index("Systolic blood pressure")) == [102.0]


def test_text_at_one_time_takes_the_last_of_the_file(tiny: Tiny) -> None:
    for first, last in (("None", "Spontaneously"), ("Spontaneously", "None")):
        events = [{"hour": 1, "item": 220739, "value": text} for text in (first, last)]
        levels = CHANNELS[3].levels
        assert values_of(tiny(events), ExtractConfig(), 3) == [float(levels.index(last))]
        assert values_of(tiny(events), CODE_RULE, 3) == [float(levels.index("Spontaneously"))]


def test_the_coma_total_is_derived_only_from_all_three_parts(tiny: Tiny) -> None:
    eye = {"hour": 1, "item": 220739, "value": "To Speech"}
    motor = {"hour": 1, "item": 223901, "value": "Localizes Pain"}
    verbal = {"hour": 1, "item": 223900, "value": "Confused"}
    charted = {"hour": 1, "item": 198, "value": "7"}
    total = NAMES.index("Glascow coma scale total")
    levels = CHANNELS[total].levels
    config, off = ExtractConfig(), ExtractConfig(derive=False)
    assert values_of(tiny([eye, motor, verbal]), config, total) == [float(levels.index("12"))]
    assert values_of(tiny([eye, motor, verbal]), off, total) == []
    assert values_of(tiny([eye, motor]), config, total) == []
    assert values_of(tiny([eye, motor, {**verbal, "hour": 1.1}]), config, total) == []
    assert values_of(tiny([eye, motor, verbal, charted]), config, total) == [
        float(levels.index("7"))
    ]


def test_scores_cover_the_levels_and_agree_with_the_numbered_ones() -> None:
    for v, scores in SCORES.items():
        assert set(scores) == set(CHANNELS[v].levels)
        for text, score in scores.items():
            assert not text[0].isdigit() or int(text[0]) == score


def test_the_items_are_those_of_the_benchmark() -> None:
    ready = [item for item in ITEMS.values() if not item.derived]
    assert len(ready) == 114
    assert {item.channel for item in ready} == set(range(17))
    assert sorted(item.itemid for item in ITEMS.values() if item.derived) == [223951, 224308]
    four = item_ids("mimic-iv-2.2")
    assert four < item_ids("mimic-iii-1.4") == set(ITEMS)
    assert item_ids("mimic-iv-2.2", "lab") == {
        50809, 50931, 51478, 50817, 50820, 50831, 51094, 51491,
    }  # fmt: skip
    assert {220051, 223835, 226707, 223762} < four
    assert 198 not in four
