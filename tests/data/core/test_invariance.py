"""The order of rows, and how subjects are dealt out, change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from data.extraction import extract_partition
from data.flow import merge_flows
from data.pairing import image_sample_schema
from data.sources.canonical import TABLES
from data.switches import ExtractConfig
from data.tasks import TASKS, task_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Tables = Mapping[str, pl.DataFrame]

FILE_ORDER = pl.int_range(pl.len()).over("source").alias("row")


def shuffled(tables: Tables) -> dict[str, pl.DataFrame]:
    return {
        name: frame.sample(fraction=1.0, shuffle=True, seed=i)
        for i, (name, frame) in enumerate(tables.items())
    }


def files_by_item(tables: Tables) -> dict[str, pl.DataFrame]:
    """As if the files themselves were sorted by item: the rows get new numbers."""
    events = tables["events"].sort("source", "itemid", "row").with_columns(FILE_ORDER)
    return {**tables, "events": events}


def files_by_subject(tables: Tables) -> dict[str, pl.DataFrame]:
    events = tables["events"].sort("source", "subject_id", "row").with_columns(FILE_ORDER)
    return {**tables, "events": events}


def config_of(preset: str, code: ExtractConfig) -> ExtractConfig:
    return code if preset == "code" else ExtractConfig()


@pytest.mark.parametrize("order", [shuffled, files_by_item, files_by_subject])
@pytest.mark.parametrize("preset", ["corrected", "code"])
@pytest.mark.parametrize("release", ["iii", "iv"])
def test_row_order_changes_nothing(
    order: Callable[[Tables], dict[str, pl.DataFrame]],
    preset: str,
    release: str,
    demo_tables: Callable[[str], Tables],
    code_config: ExtractConfig,
) -> None:
    tables, config = demo_tables(release), config_of(preset, code_config)
    reordered = order(tables)
    assert not reordered["events"].equals(tables["events"]) or release == "iii"
    one = extract_partition(tables, task_spec("phenotyping"), config)
    other = extract_partition(reordered, task_spec("phenotyping"), config)
    assert_frame_equal(one.samples, other.samples, check_exact=True)
    assert one.flow == other.flow
    assert one.counters == other.counters


@pytest.mark.parametrize("preset", ["corrected", "code"])
def test_partitions_together_are_the_whole(
    preset: str, demo_tables: Callable[[str], Tables], code_config: ExtractConfig
) -> None:
    tables, config = demo_tables("iii"), config_of(preset, code_config)
    whole = extract_partition(tables, task_spec("phenotyping"), config)
    parts = []
    for third in range(3):
        own = {
            name: frame.filter(pl.col("subject_id") % 3 == third)
            if "subject_id" in frame.columns
            else frame
            for name, frame in tables.items()
        }
        parts.append(extract_partition(own, task_spec("phenotyping"), config))
    together = pl.concat([part.samples for part in parts]).sort("subject_id", "stay_id")
    assert_frame_equal(together, whole.samples, check_exact=True)
    assert merge_flows([part.flow for part in parts]) == whole.flow


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("preset", ["corrected", "code"])
def test_an_empty_partition_has_the_schema_and_the_whole_flow(
    task: str, preset: str, demo_tables: Callable[[str], Tables], code_config: ExtractConfig
) -> None:
    config = config_of(preset, code_config)
    nothing = {name: pl.DataFrame(schema=schema) for name, schema in TABLES.items()}
    empty = extract_partition(nothing, task_spec(task), config)
    assert dict(empty.samples.schema) == image_sample_schema()
    assert empty.samples.is_empty()
    full = extract_partition(demo_tables("iii"), task_spec(task), config)
    assert [step.rule for step in empty.flow] == [step.rule for step in full.flow]
    assert dict(full.samples.schema) == image_sample_schema()
    assert all(step.rows_in >= step.rows_out >= 0 for step in full.flow)


def test_equal_numbers_at_one_time_from_two_items_do_not_depend_on_the_file(
    tiny: Callable[..., dict[str, pl.DataFrame]],
) -> None:
    texts = ("Normal <3 Seconds", "Abnormal >3 Seconds")
    rows = [
        {"hour": 2, "item": i, "value": t} for i, t in zip((223951, 224308), texts, strict=True)
    ]
    one, other = (
        extract_partition(tiny(order), task_spec("mortality"), ExtractConfig()).samples
        for order in (rows, rows[::-1])
    )
    assert one["ehr"].to_list()[0][2 * 17] == 1.0
    assert_frame_equal(one, other, check_exact=True)
