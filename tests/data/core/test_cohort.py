"""The cohort's rules: their order, ages, deaths, and what is refused."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import polars as pl
import pytest

from data.cohort import select_stays
from data.errors import InputError
from data.extraction import extract_partition
from data.ledger import Ledger
from data.switches import ExtractConfig
from data.tasks import task_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Tiny = Callable[..., dict[str, pl.DataFrame]]

EVENT = [{"hour": 1, "item": 220045, "value": "70"}]
HOUR = timedelta(hours=1)


def select(
    tables: dict[str, pl.DataFrame], config: ExtractConfig | None = None
) -> tuple[pl.DataFrame, dict[str, tuple[int, int]]]:
    ledger = Ledger()
    stays = select_stays(tables, config or ExtractConfig(), ledger)
    return stays, {step.rule: (step.rows_in, step.rows_out) for step in ledger.flow}


def second_stay(tables: dict[str, pl.DataFrame], **columns: object) -> dict[str, pl.DataFrame]:
    stays = tables["icustays"]
    other = stays.with_columns(
        pl.lit(701, dtype=pl.Int64).alias("stay_id"),
        *(pl.lit(value, dtype=stays.schema[name]).alias(name) for name, value in columns.items()),
    )
    return {**tables, "icustays": pl.concat([stays, other])}


def test_a_transfer_leaves_before_stays_are_counted(tiny: Tiny) -> None:
    both = second_stay(tiny(EVENT))
    stays, flow = select(both)
    assert stays.is_empty()
    assert flow["one stay per admission"] == (2, 0)
    one_moved = second_stay(tiny(EVENT), last_careunit="CCU")
    stays, flow = select(one_moved)
    assert stays["stay_id"].to_list() == [700]
    assert flow["no transfer between units"] == (2, 1)
    assert flow["one stay per admission"] == (1, 1)


@pytest.mark.parametrize(
    ("wards", "kept"), [((None, None), 1), ((5, 5), 1), ((5, 6), 0), ((5, None), 0)]
)
def test_wards_count_where_there_are_any(
    wards: tuple[int | None, int | None], kept: int, tiny: Tiny
) -> None:
    first, last = wards
    tables = tiny(EVENT, icustays={"first_wardid": first, "last_wardid": last})
    assert select(tables)[0].height == kept


@pytest.mark.parametrize(
    ("patient", "age_rule", "age"),
    [
        ({"anchor_age": 60, "anchor_year": 2148}, "admission", 62.0),
        ({"anchor_age": 60, "anchor_year": 2148}, "anchor", 60.0),
        ({"anchor_age": 17, "anchor_year": 2148}, "admission", 19.0),
        ({"anchor_age": 17, "anchor_year": 2148}, "anchor", None),
        ({"dob": datetime(2090, 3, 10, 6, 30), "anchor_age": None}, "anchor", 60.0),  # noqa: DTZ001
        ({"dob": datetime(1850, 1, 1), "anchor_age": None}, "admission", 90.0),  # noqa: DTZ001
        ({"dob": datetime(2140, 1, 1), "anchor_age": None}, "admission", None),  # noqa: DTZ001
        ({"anchor_age": None}, "admission", None),
    ],
)
def test_ages(patient: dict[str, object], age_rule: str, age: float | None, tiny: Tiny) -> None:
    config = ExtractConfig.model_validate({"age": age_rule})
    stays, _ = select(tiny(EVENT, patients=patient), config)
    assert stays["age"].to_list() == ([] if age is None else [pytest.approx(age, abs=0.01)])


@pytest.mark.parametrize(
    ("death_hour", "died"),
    [(-6, False), (-5, True), (50, True), (90, True), (113, True), (115, False)],
)
def test_a_death_in_hospital_lies_between_admission_and_a_day_after_discharge(
    death_hour: int, died: bool, tiny: Tiny
) -> None:
    intime = tiny(EVENT)["icustays"]["intime"][0]
    tables = tiny(EVENT, admissions={"deathtime": intime + death_hour * HOUR})
    assert select(tables)[0]["died"].to_list() == [died]


def test_stays_without_length_or_in_wrong_order_leave(tiny: Tiny) -> None:
    _, flow = select(tiny(EVENT, icustays={"los": None}))
    assert flow["length of stay known"] == (1, 0)
    intime = tiny(EVENT)["icustays"]["intime"][0]
    backwards = tiny(EVENT, icustays={"outtime": intime - HOUR})
    ledger = Ledger()
    assert select_stays(backwards, ExtractConfig(), ledger).is_empty()
    (aside,) = ledger.quarantine
    assert (aside.place, aside.reason, aside.examples) == (
        "icustays",
        "times out of order",
        ("700",),
    )


def test_no_diagnosis_and_no_event_drop_a_stay_each_by_its_rule(tiny: Tiny) -> None:
    for tables, rule in (
        ({**tiny(EVENT), "diagnoses": tiny(EVENT)["diagnoses"].clear()}, "diagnoses known"),
        (tiny([]), "has an event"),
        (tiny([{"hour": 1, "item": 220045, "value": "broken"}]), "has an event"),
        (tiny(EVENT, icustays={"los": 1.9}), "long enough"),
        (tiny(EVENT, admissions={"subject_id": 8}), "admission and patient known"),
    ):
        result = extract_partition(tables, task_spec("mortality"), ExtractConfig())
        assert result.samples.is_empty()
        losses = [s.rule for s in result.flow if s.unit == "stays" and s.rows_out < s.rows_in]
        assert losses == [rule]


@pytest.mark.parametrize("release", ["iii", "iv"])
def test_every_stay_is_a_sample_or_named_under_the_one_rule_that_removed_it(
    release: str, demo_tables: Callable[[str], Mapping[str, pl.DataFrame]]
) -> None:
    tables = demo_tables(release)
    result = extract_partition(tables, task_spec("mortality"), ExtractConfig())
    lost = {s.rule: s.rows_in - s.rows_out for s in result.flow if s.unit == "stays"}
    assert {rule: len(stays) for rule, stays in result.excluded.items()} == lost
    assert sum(count > 0 for count in lost.values()) >= 3
    named = [stay for stays in result.excluded.values() for stay in stays]
    assert sorted([*named, *result.samples["stay_id"]]) == sorted(tables["icustays"]["stay_id"])
    short = tables["icustays"].filter(pl.col("stay_id").is_in(result.excluded["long enough"]))
    assert (short["los"] < 2.0).all()


def test_identical_rows_are_merged_and_different_ones_refused(tiny: Tiny) -> None:
    tables = tiny(EVENT)
    twice = {**tables, "icustays": pl.concat([tables["icustays"]] * 2)}
    ledger = Ledger()
    assert select_stays(twice, ExtractConfig(), ledger).height == 1
    assert [(q.place, q.count) for q in ledger.quarantine] == [("icustays", 1)]
    for table, column, key in (
        ("icustays", "los", "stay_id 700"),
        ("admissions", "dischtime", "hadm_id 70"),
        ("patients", "sex", "subject_id 7"),
    ):
        blank = tables[table].with_columns(
            pl.lit(None).cast(tables[table].schema[column]).alias(column)
        )
        clash = {**tables, table: pl.concat([tables[table], blank])}
        with pytest.raises(InputError, match=f"table {table}: {key} .* must be unique"):
            select_stays(clash, ExtractConfig(), Ledger())


def test_events_before_birth_are_set_aside(tiny: Tiny) -> None:
    birth = {"dob": datetime(2120, 1, 1), "anchor_age": None}  # noqa: DTZ001
    wrong = {"hour": -400_000, "item": 220045, "value": "70"}
    result = extract_partition(
        tiny([*EVENT, wrong], patients=birth), task_spec("mortality"), ExtractConfig()
    )
    assert [(q.reason, q.count) for q in result.quarantine] == [("before birth", 1)]
    assert sum(result.samples["ehr_observed"].to_list()[0]) == 1


def test_radiology_samples_are_images_without_series(
    tiny: Tiny, with_images: Callable[..., dict[str, pl.DataFrame]]
) -> None:
    result = extract_partition(with_images(tiny(EVENT)), task_spec("radiology"), ExtractConfig())
    assert result.samples.height == 4
    assert result.samples["ehr"].null_count() == 4
    assert result.samples["labels"].to_list()[0] == [1.0] + [0.0] * 13
    assert result.flow
