"""Each data switch of a partition changes an output when it is flipped."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import polars as pl
import pytest

from data.extraction import extract_partition
from data.ontology import phenotype_map
from data.switches import ExtractConfig
from data.tasks import task_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Tables = Mapping[str, pl.DataFrame]
    Tiny = Callable[..., dict[str, pl.DataFrame]]

HEART_RATE = 220045


def column(tables: Tables, task: str, config: ExtractConfig, name: str) -> list[object]:
    return extract_partition(tables, task_spec(task), config).samples[name].to_list()


@pytest.mark.parametrize(
    ("switch", "value", "release", "task", "name"),
    [
        ("timestep_hours", 2.0, "iv", "mortality", "ehr_observed"),
        ("outliers", "keep", "iii", "phenotyping", "ehr"),
        ("icd10_map", "forward_last", "iv", "phenotyping", "labels"),
        ("icd10_map", "backward_first", "iv", "phenotyping", "labels"),
        ("units", "as_found", "iii", "phenotyping", "ehr"),
        ("duplicates", "text_maximum", "iii", "phenotyping", "ehr"),
        ("derive", False, "iii", "phenotyping", "ehr"),
        ("age", "anchor", "iv", "phenotyping", "age"),
        ("error_rows", "keep", "iii", "phenotyping", "ehr"),
        ("availability", "charttime", "iii", "mortality", "ehr"),
        ("split", {"seed": 1}, "iii", "mortality", "split"),
    ],
)
def test_flipping_a_switch_changes_the_demo(
    switch: str,
    value: object,
    release: str,
    task: str,
    name: str,
    demo_tables: Callable[[str], Tables],
) -> None:
    tables = demo_tables(release)
    flipped = ExtractConfig.model_validate({switch: value})
    before = column(tables, task, ExtractConfig(), name)
    assert before == column(tables, task, ExtractConfig(), name)
    assert before != column(tables, task, flipped, name)


def test_deaths_by_time_or_by_the_midnight_of_a_date(tiny: Tiny) -> None:
    events = [{"hour": 1, "item": HEART_RATE, "value": "70"}]
    admission = tiny(events)["admissions"]
    midnights = [admission[name].dt.truncate("1d")[0] for name in ("admittime", "dischtime")]
    time, mixed = ExtractConfig(), ExtractConfig(deaths="mixed")
    day = timedelta(days=1)
    for date, by_time, by_midnight in (
        (midnights[0] - day, 0.0, 0.0),
        (midnights[0], 1.0, 0.0),
        (midnights[1], 1.0, 1.0),
        (midnights[1] + day, 0.0, 0.0),
    ):
        tables = tiny(events, patients={"dod": date})
        assert column(tables, "mortality", time, "labels") == [[by_time]]
        assert column(tables, "mortality", mixed, "labels") == [[by_midnight]]
    late = admission["dischtime"][0] + timedelta(hours=20)
    tables = tiny(events, admissions={"deathtime": late}, patients={"dod": midnights[1] + day})
    assert column(tables, "mortality", time, "labels") == [[1.0]]
    assert column(tables, "mortality", mixed, "labels") == [[0.0]]


def test_icd_join_on_the_code_alone_mixes_the_versions(tiny: Tiny) -> None:
    table = phenotype_map("resolved")
    nine, ten = (table.filter(pl.col("icd_version") == v) for v in (9, 10))
    either = ten.filter(pl.col("icd_code").str.starts_with("E8")).join(
        nine, on="icd_code", how="anti"
    )
    code = either["icd_code"].sort()[0]
    tables = tiny(
        [{"hour": 1, "item": HEART_RATE, "value": "70"}],
        diagnoses={"icd_code": code, "icd_version": 9},
    )
    tables["icd_dictionary"] = pl.DataFrame(
        {"icd_code": [code, code], "icd_version": [9, 10]}, schema=tables["icd_dictionary"].schema
    )
    right = column(tables, "phenotyping", ExtractConfig(), "labels")
    mixed = column(tables, "phenotyping", ExtractConfig(icd_join="code"), "labels")
    assert sum(right[0]) == 0
    assert sum(mixed[0]) > 0


def test_event_to_stay_by_id_then_time_or_as_released(tiny: Tiny) -> None:
    glucose = {"item": 50931, "stay_id": None}
    tables = tiny(
        [
            {"hour": 1, "item": HEART_RATE, "value": "70"},
            {"hour": 2, "value": "120", **glucose},
            {"hour": 3, "value": "130", "hadm_id": None, **glucose},
            {"hour": 4, "item": HEART_RATE, "value": "90", "hadm_id": 71},
            {"hour": 5, "item": HEART_RATE, "value": "95", "stay_id": 701},
            {"hour": 6, "item": HEART_RATE, "value": "99", "subject_id": 8},
        ]
    )
    as_found = ExtractConfig(event_to_stay="as_found")
    bins = {}
    for name, config in (("by_time", ExtractConfig()), ("as_found", as_found)):
        observed = column(tables, "mortality", config, "ehr_observed")[0]
        bins[name] = sorted(i // 17 for i, seen in enumerate(observed) if seen)
    assert bins == {"by_time": [0, 1, 2, 3], "as_found": [0, 1]}


def test_late_margin_hours_decide_what_follows_a_death(tiny: Tiny) -> None:
    events = [
        {"hour": 1, "item": HEART_RATE, "value": "70"},
        {"hour": 40, "item": HEART_RATE, "value": "90"},
    ]
    tables = tiny(events)
    died = tables["icustays"]["intime"][0].replace(hour=16)
    tables = tiny(events, admissions={"deathtime": died})
    close, wide = ExtractConfig(), ExtractConfig(late_margin_hours=48)
    assert sum(column(tables, "mortality", close, "ehr_observed")[0]) == 1
    assert sum(column(tables, "mortality", wide, "ehr_observed")[0]) == 2
    result = extract_partition(tables, task_spec("mortality"), close)
    (aside,) = result.quarantine
    assert (aside.place, aside.count) == ("events", 1)
    assert aside.examples == ("chart row 1",)
    as_found = close.model_copy(update={"event_to_stay": "as_found"})
    assert sum(column(tables, "mortality", as_found, "ehr_observed")[0]) == 2


@pytest.mark.parametrize(
    ("switch", "value", "expected"),
    [("cxr_view", "LATERAL", "-47.5-LATERAL"), ("cxr_window", "stay", "-49-AP")],
)
def test_image_switches(
    switch: str,
    value: str,
    expected: str,
    tiny: Tiny,
    with_images: Callable[[Tables], dict[str, pl.DataFrame]],
) -> None:
    tables = with_images(tiny([{"hour": 1, "item": HEART_RATE, "value": "70"}]))
    config = ExtractConfig.model_validate({switch: value})
    assert column(tables, "mortality", ExtractConfig(), "dicom_id") == ["700-47-AP"]
    assert column(tables, "mortality", config, "dicom_id") == [f"700{expected}"]
    samples = extract_partition(tables, task_spec("mortality"), config).samples
    assert (samples["cxr_available_at"] <= samples["prediction_time"]).all()
