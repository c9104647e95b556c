"""The extraction of admissions against a literal reading of its rules, row by row."""

from __future__ import annotations

import math
from datetime import timedelta
from itertools import pairwise

import numpy as np
import polars as pl
import pytest

from data.code_lists import shipped
from data.extraction import extract_partition
from data.lab_text import Result, read_lab_text
from data.lab_units import conversion, unit_name
from data.sections import kept_text
from data.switches import AdmissionConfig, ExtractConfig
from data.tasks import task_spec

TASK = task_spec("diagnoses")
SWITCHES = (
    {},
    {"target_visits": "from_second", "history_visits": 2, "lab_value": "mean"},
    {"label_scope": "patient_union", "label_hierarchy": True, "lab_window": "24h"},
    {"late_notes": "keep", "sections": "all", "lab_units": "as_found", "history_visits": 0},
    {"require_notes": False, "require_labs": False, "min_visits": 1, "min_age": 0},
)


def literal(  # noqa: C901 - a literal reading has the rules in one place
    tables: dict[str, pl.DataFrame], switches: AdmissionConfig
) -> dict[int, dict]:
    """hadm_id -> what the row must hold, by loops over dicts."""
    rows = {name: table.to_dicts() for name, table in tables.items()}
    born = {row["subject_id"]: row["dob"] for row in rows["patients"]}
    by_subject: dict[int, list[dict]] = {}
    for row in rows["admissions"]:
        if row["admittime"] <= row["dischtime"]:
            by_subject.setdefault(row["subject_id"], []).append(row)
    expected = {}
    for subject, visits in by_subject.items():
        visits.sort(key=lambda row: (row["admittime"], row["hadm_id"]))
        if len(visits) < switches.min_visits:
            continue
        earlier: list[tuple] = []
        for number, visit in enumerate(visits):
            age = (visit["admittime"] - born[subject]).total_seconds() / 86400 / 365.2425
            age = 91.4 if age > 182 else age
            own = [row for row in rows["diagnoses"] if row["hadm_id"] == visit["hadm_id"]]
            if age < switches.min_age or not own:
                continue
            note = _note(rows["notes"], visit, switches)
            at = visit["dischtime"] if note is None else max(visit["dischtime"], note[1])
            past = [one for one in reversed(earlier) if one[1] <= at][: switches.history_visits]
            if note:
                earlier.append(note)
            if switches.target_visits == "from_second" and number == 0:
                continue
            texts = ([note[0]] if note else []) + [f"Earlier admission:\n{t}" for t, _ in past]
            if switches.require_notes and not note:
                continue
            labs = _labs(rows, visit, at, switches)
            if (switches.require_labs and not labs) or not (texts or labs):
                continue
            coded = own
            if switches.label_scope == "patient_union":
                coded = [row for row in rows["diagnoses"] if row["subject_id"] == subject]
            expected[visit["hadm_id"]] = {
                "notes": "\n".join(texts) if texts else None,
                "labels": _labels(coded, switches),
                "labs": labs,
                "time": at,
            }
    return expected


def _note(notes: list[dict], visit: dict, switches: AdmissionConfig) -> tuple | None:
    mine = []
    for row in notes:
        if row["hadm_id"] != visit["hadm_id"] or row["category"] != "Discharge summary":
            continue
        late = row["charttime"].date() > visit["dischtime"].date()
        if row["text"] is None or (late and switches.late_notes == "drop"):
            continue
        known = row["charttime"] if late else min(row["charttime"], visit["dischtime"])
        mine.append((row["charttime"], row["text"], row["addendum"], known))
    reports = sorted(one for one in mine if not one[2])[-1:]
    used = reports + sorted(one for one in mine if one[2])
    parts = [kept_text(one[1], sections=switches.sections) for one in used]
    text = "\n".join(part for part in parts if part.strip())
    return (text, max(one[3] for one in used)) if text else None


def _labs(rows: dict, visit: dict, at, switches: AdmissionConfig) -> dict[str, tuple]:
    names = {row["item"]: row["name"] for row in rows["lab_names"]}
    results: dict[str, list] = {}
    for row in rows["labs"]:
        owner = row["hadm_id"]
        if owner is None:
            inside = row["subject_id"] == visit["subject_id"]
            inside = inside and visit["admittime"] <= row["charttime"] <= visit["dischtime"]
            owner = visit["hadm_id"] if inside else None
        known = row["storetime"] or row["charttime"]
        end = at
        if switches.lab_window == "24h":
            end = min(at, visit["admittime"] + timedelta(hours=24))
        if owner != visit["hadm_id"] or row["charttime"] > end or known > at:
            continue
        if row["valuenum"] is None:
            continue
        unit, factor = conversion(names[row["item"]], row["unit"])
        if switches.lab_units == "as_found":
            unit, factor = unit_name(row["unit"]), 1.0
        key = (row["charttime"], known, row["valuenum"])
        results.setdefault(row["item"], []).append((key, row["valuenum"] * factor, unit))
    found = {}
    for item, listed in results.items():
        _, value, unit = max(listed)
        if switches.lab_value == "mean":
            value = float(np.mean([v for _, v, u in listed if u == unit]))
        found[item] = (value, unit)
    return found


def _labels(diagnoses: list[dict], switches: AdmissionConfig) -> list[float]:
    lists = shipped("elixhauser")
    codes = [
        (row["icd_version"], row["icd_code"].strip().replace(".", "").upper()) for row in diagnoses
    ]
    found = []
    for label, prefixes in zip(lists.labels, lists.prefixes, strict=True):
        on = any(v == w and code.startswith(p) for v, code in codes for w, p in prefixes)
        severer = lists.hierarchy.get(label, ()) if switches.label_hierarchy else ()
        off = any(v == w and code.startswith(p) for v, code in codes for w, p in severer)
        found.append(float(on and not off))
    return found


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(s) or "default")
@pytest.mark.parametrize("seed", range(4))
def test_a_literal_reading_gives_the_same_rows(clinic, seed, switches):
    tables = clinic(seed, patients=40)
    settings = AdmissionConfig(**switches)
    samples = extract_partition(tables, TASK, ExtractConfig(admissions=settings)).samples
    expected = literal(tables, settings)
    assert sorted(samples["hadm_id"]) == sorted(expected)
    assert len(expected) > 3
    for row in samples.iter_rows(named=True):
        wanted = expected[row["hadm_id"]]
        assert row["notes"] == wanted["notes"]
        assert row["labels"] == wanted["labels"]
        assert row["prediction_time"] == wanted["time"]
        assert row["stay_id"] is None is row["ehr"]
        columns = (row[name] or [] for name in ("lab_items", "labs", "lab_units"))
        listed = {item: (value, unit) for item, value, unit in zip(*columns, strict=True)}
        assert listed.keys() == wanted["labs"].keys()
        for item, (value, unit) in wanted["labs"].items():
            assert math.isclose(listed[item][0], value, rel_tol=1e-6)
            assert listed[item][1] == unit
        for column in ("notes_available_at", "labs_available_at"):
            assert row[column] is None or row[column] <= row["prediction_time"]


def test_row_order_and_other_partitions_change_nothing(clinic):
    tables = clinic(7)
    config = ExtractConfig()
    whole = extract_partition(tables, TASK, config).samples
    shuffled = {
        name: table.sample(fraction=1, shuffle=True, seed=3) for name, table in tables.items()
    }
    assert extract_partition(shuffled, TASK, config).samples.equals(whole)
    parts = []
    for half in (0, 1):
        own = {
            name: table.filter(pl.col("subject_id") % 2 == half)
            if "subject_id" in table.columns
            else table
            for name, table in tables.items()
        }
        parts.append(extract_partition(own, TASK, config).samples)
    assert (
        pl.concat(parts).sort("subject_id", "hadm_id").equals(whole.sort("subject_id", "hadm_id"))
    )


def test_every_rule_is_counted_and_the_flow_adds_up(clinic):
    result = extract_partition(clinic(1, patients=40), TASK, ExtractConfig())
    steps = [step for step in result.flow if step.unit == "admissions"]
    assert [step.rule for step in steps] == [
        "patient known",
        "times in order",
        "several visits",
        "adults",
        "diagnoses known",
        "is a target visit",
        "has a section of the note",
        "has a lab result",
        "has a note or labs",
    ]
    for before, after in pairwise(steps):
        assert before.rows_out == after.rows_in
    assert steps[-1].rows_out == result.samples.height > 0
    assert all(step.rows_out < step.rows_in for step in steps[1:5] + steps[6:8])


def test_only_abnormal_results_enter_the_sentence(clinic):
    """Sanity check 33."""
    tables = clinic(3, patients=40)
    samples = extract_partition(tables, TASK, ExtractConfig()).samples
    names = dict(tables["lab_names"].iter_rows())
    seen = 0
    for row in samples.iter_rows(named=True):
        flagged = tables["labs"].filter(pl.col("flag") == "abnormal")
        allowed = {
            (names[item].replace(":", ",").replace(";", ","), value)
            for item, value in flagged.filter(
                (pl.col("hadm_id") == row["hadm_id"]) | pl.col("hadm_id").is_null()
            )
            .select("item", "value")
            .iter_rows()
        }
        listed = read_lab_text(row["lab_text"]) if row["lab_text"] else []
        seen += len(listed)
        assert all((result.name, result.value) in allowed for result in listed)
        assert len({result.name for result in listed}) == len(listed)
        assert all(isinstance(result, Result) for result in listed)
    assert seen > 5


@pytest.mark.parametrize(
    "changed",
    [
        {"target_visits": "from_second"},
        {"label_scope": "patient_union"},
        {"label_hierarchy": True},
        {"sections": "all"},
        {"late_notes": "keep"},
        {"lab_window": "48h"},
        {"lab_value": "mean"},
        {"lab_units": "as_found"},
        {"abnormal": "range"},
        {"history_visits": 0},
        {"require_notes": False},
        {"require_labs": False},
        {"min_visits": 1},
        {"min_age": 0},
        {"note_limit": 30},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_flipping_a_switch_changes_the_samples(clinic, changed):
    tables = clinic(5, patients=40)
    default = extract_partition(tables, TASK, ExtractConfig()).samples
    config = ExtractConfig(admissions=AdmissionConfig(**changed))
    assert not extract_partition(tables, TASK, config).samples.equals(default)
