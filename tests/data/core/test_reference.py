"""A slow, literal reading of the benchmark's rules, row by row, against the fast path.

It shares no code with `data.extraction` and its modules: it reads the CSV files itself, with the
standard library alone, and keeps every rule as a plain `if`. Only the channels' levels and normal
values (the contract) and the map from ICD codes to labels (tested on its own) are taken over.
"""

from __future__ import annotations

import csv
import gzip
import math
import re
from collections import Counter, defaultdict
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from data import ontology
from data.extraction import extract_partition
from data.schema import CHANNELS
from data.switches import ExtractConfig
from data.tasks import task_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import polars as pl

ROOT = Path(__file__).parents[3]
FOLDERS = {"iii": ROOT / "data" / "demo" / "mimic-iii", "iv": ROOT / "data" / "demo" / "mimic-iv"}
NAMES = [channel.name for channel in CHANNELS]
RANGES = {
    "Diastolic blood pressure": (0, 0, 375, 375),
    "Fraction inspired oxygen": (0.2, 0.21, 1, 1.1),
    "Glucose": (0, 33, 2000, 2200),
    "Heart Rate": (0, 0, 350, 390),
    "Height": (0, 0, 240, 275),
    "Mean blood pressure": (0, 14, 330, 375),
    "Oxygen saturation": (0, 0, 100, 150),
    "Respiratory rate": (0, 0, 300, 330),
    "Systolic blood pressure": (0, 0, 375, 375),
    "Temperature": (14.2, 26, 45, 47),
    "Weight": (0, 0, 250, 250),
    "pH": (6.3, 6.3, 8.4, 10),
}
POINTS = {
    "none": 1, "no response": 1, "no response-ett": 1, "to pain": 2, "to speech": 3,
    "spontaneously": 4, "abnormal extension": 2, "abnormal flexion": 3, "flex-withdraws": 4,
    "localizes pain": 5, "obeys commands": 6, "incomprehensible sounds": 2,
    "inappropriate words": 3, "confused": 4, "oriented": 5,
}  # fmt: skip
EYE, MOTOR, TOTAL, VERBAL = (NAMES.index(f"Glascow coma scale {part}") for part in (
    "eye opening", "motor response", "total", "verbal response"))  # fmt: skip
Row = dict[str, Any]


@cache
def read(folder: Path, name: str) -> list[Row]:
    (path,) = (
        p for p in folder.rglob("*.csv.gz")
        if p.name.lower() in (f"{name}.csv.gz", f"{name}_reconstructed.csv.gz")
    )  # fmt: skip
    with gzip.open(path, "rt", encoding="utf-8", newline="") as stream:
        return [
            {key.lower(): value or None for key, value in row.items()}
            for row in csv.DictReader(stream)
        ]


def read_items() -> dict[int, tuple[str, str, str, bool]]:
    path = ROOT / "data" / "resources" / "items.csv"
    lines = [line for line in path.read_text("utf-8").splitlines() if line[0] != "#"]
    return {
        int(row["itemid"]): (row["channel"], row["label"], row["unit"], row["status"] == "derived")
        for row in csv.DictReader(lines)
    }


def when(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def cohort(folder: Path, code: bool) -> list[Row]:
    admissions = {row["hadm_id"]: row for row in read(folder, "admissions")}
    patients = {row["subject_id"]: row for row in read(folder, "patients")}
    kept = []
    for stay in read(folder, "icustays"):
        if stay["first_careunit"] != stay["last_careunit"] or not stay["first_careunit"]:
            continue
        if stay.get("first_wardid") != stay.get("last_wardid"):
            continue
        admission, patient = admissions.get(stay["hadm_id"]), patients.get(stay["subject_id"])
        if not admission or not patient or admission["subject_id"] != stay["subject_id"]:
            continue
        kept.append({**admission, **patient, **stay})
    stays_of = Counter(stay["hadm_id"] for stay in kept)
    dictionary = {
        row.get("icd_code") or row.get("icd9_code") for row in read(folder, "d_icd_diagnoses")
    }
    coded = {
        row["hadm_id"]
        for row in read(folder, "diagnoses_icd")
        if not code or (row.get("icd_code") or row.get("icd9_code")) in dictionary
    }
    chosen = []
    for stay in kept:
        stay["stay_id"] = stay.get("stay_id") or stay.get("icustay_id")
        for name in ("intime", "outtime", "admittime", "dischtime", "deathtime", "dob", "dod"):
            stay[name] = when(stay.get(name))
        if stays_of[stay["hadm_id"]] != 1 or stay["los"] is None:
            continue
        stay["age"] = age_of(stay, code)
        if stay["age"] < 18:
            continue
        if not code and (stay["outtime"] < stay["intime"] or stay["dischtime"] < stay["admittime"]):
            continue
        stay["died"] = died(stay, code)
        stay["coded"] = stay["hadm_id"] in coded
        stay["hours"] = float(stay["los"]) * 24
        chosen.append(stay)
    return chosen


def age_of(stay: Row, code: bool) -> float:
    if stay["dob"]:
        age = (stay["intime"] - stay["dob"]) / timedelta(days=1) / 365.25
        return 90.0 if age > 180 else age
    if code:
        return float(stay["anchor_age"])
    return float(stay["anchor_age"]) + stay["intime"].year - int(stay["anchor_year"])


def died(stay: Row, code: bool) -> bool:
    begin, end, day = stay["admittime"], stay["dischtime"], timedelta(days=1)
    if code:
        return any(t is not None and begin <= t <= end for t in (stay["dod"], stay["deathtime"]))
    if stay["deathtime"]:
        return begin <= stay["deathtime"] <= end + day
    if stay["dod"]:
        return begin.date() <= stay["dod"].date() <= end.date()
    return False


def read_events(folder: Path, code: bool) -> list[Row]:
    items = read_items()
    events = []
    for source, name in (
        ("chart", "chartevents"),
        ("lab", "labevents"),
        ("output", "outputevents"),
    ):
        for number, row in enumerate(read(folder, name)):
            item = items.get(int(row["itemid"]))
            if item is None or (code and item[3]):
                continue
            if row.get("error") == "1" and not code:
                continue
            if not row["charttime"] or not row["value"]:
                continue
            events.append({
                "subject": row["subject_id"], "hadm": row.get("hadm_id"),
                "stay": row.get("stay_id") or row.get("icustay_id"),
                "t": when(row["charttime"]), "store": when(row.get("storetime")),
                "text": row["value"], "unit": row.get("valueuom") or "",
                "channel": item[0], "label": item[1], "item_unit": item[2],
                "place": (source, int(row["itemid"]), number),
            })  # fmt: skip
    return events


def stays_of_event(event: Row, stays: list[Row], code: bool) -> list[Row]:
    if code:
        if event["hadm"] is None:
            return []
        own = [s for s in stays if s["hadm_id"] == event["hadm"]]
        if not own or event["stay"] not in (None, own[0]["stay_id"]):
            return []
        return own + [
            s for s in stays if s is not own[0] and s["intime"] <= event["t"] <= s["outtime"]
        ]
    if event["stay"] is not None:
        return [s for s in stays if s["stay_id"] == event["stay"]]
    inside = [s for s in stays if s["intime"] <= event["t"] <= s["outtime"]]
    return inside if len(inside) == 1 else []


def plausible(event: Row, stay: Row) -> bool:
    margin = timedelta(hours=24)
    death = stay["deathtime"] or (stay["dod"] and stay["dod"] + timedelta(days=1))
    if stay["dob"] and event["t"] < stay["dob"]:
        return False
    if death and event["t"] > death + margin:
        return False
    return event["t"] <= stay["dischtime"] + margin


def number_of(event: Row, code: bool) -> float | None:
    """The cleaned value; of a channel with levels, the index of its level."""
    name, text = event["channel"], event["text"].strip()
    channel = CHANNELS[NAMES.index(name)]
    if channel.levels:
        return level_of(name, text, channel.levels)
    pair = re.fullmatch(r"(\d+)/(\d+)", text)
    if pair and name in ("Systolic blood pressure", "Diastolic blood pressure"):
        text = pair[1] if name.startswith("Systolic") else pair[2]
    try:
        value = float(text)
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    if value < 0 and name in ("Glucose", "Oxygen saturation", "pH"):
        return None
    value = converted(value, event, code)
    if code:
        return value
    outlier_low, low, high, outlier_high = RANGES[name]
    if value < outlier_low or value > outlier_high:
        return None
    return min(max(value, low), high)


def level_of(name: str, text: str, levels: tuple[str, ...]) -> float | None:
    if name == "Capillary refill rate":
        if text in ("Normal <3 secs", "Normal <3 Seconds", "Brisk"):
            return 0.0
        return 1.0 if text in ("Abnormal >3 secs", "Abnormal >3 Seconds", "Delayed") else None
    if name.endswith("total") and re.fullmatch(r"\d+(\.0*)?", text):
        text = str(int(float(text)))
    return float(levels.index(text)) if text in levels else None


def converted(value: float, event: Row, code: bool) -> float:
    name, unit = event["channel"], "" if code else event["unit"].lower()
    label = event["label"].lower()
    if name == "Oxygen saturation" and value <= 1:
        return value * 100.0
    if name == "Fraction inspired oxygen":
        return value / 100.0 if code or (value > 1 and "torr" not in unit) else value
    if name == "Temperature":
        if "f" in unit:
            fahrenheit = True
        elif "c" in unit:
            fahrenheit = False
        else:
            fahrenheit = value >= 79 or (event["item_unit"] == "F" and not code)
        return (value - 32) * 5.0 / 9 if fahrenheit else value
    if name == "Weight":
        said = unit if re.search("oz|lb|pound|kg", unit) else label
        if "oz" in said:
            return value / 16.0 * 0.453592
        return value * 0.453592 if "lb" in said or "pound" in said else value
    if name == "Height":
        said = unit if re.search("in|cm", unit) else (label if code else event["item_unit"])
        return float(np.round(value * 2.54)) if "in" in said else value
    return value


def winner(events: list[Row], textual: bool, code: bool) -> Row:
    """One of several values of a variable at one time."""
    if len(events) == 1:
        return events[0]
    name = events[0]["channel"]
    if code:
        text_channels = ("Heart Rate", "Mean blood pressure", "Respiratory rate")
        if textual and (name in text_channels or name.startswith("Glascow")):
            return max(events, key=lambda e: e["text"])
        return max(events, key=lambda e: e["number"])
    stored = [e for e in events if e["store"]]
    if stored:
        latest = max(e["store"] for e in stored)
        events = [e for e in stored if e["store"] == latest]
    events = sorted(events, key=lambda e: e["place"])
    if CHANNELS[NAMES.index(name)].levels:
        best = dict(events[-1])
    else:
        best = dict(events[0], number=sum(e["number"] for e in events) / len(events))
    best["known"] = max(e["known"] for e in events)
    return best


def with_total(values: dict[tuple[datetime, int], Row]) -> None:
    for t in {t for t, _ in values}:
        if (t, TOTAL) in values or not all((t, v) in values for v in (EYE, MOTOR, VERBAL)):
            continue
        parts = [values[t, v] for v in (EYE, MOTOR, VERBAL)]
        total = sum(points_of(part) for part in parts)
        level = CHANNELS[TOTAL].levels.index(str(total))
        values[t, TOTAL] = {"number": float(level), "known": max(p["known"] for p in parts)}


def points_of(part: Row) -> int:
    text = part["text"].strip()
    return int(text[0]) if text[0].isdigit() else POINTS[text.lower()]


def discretised(
    values: dict[tuple[datetime, int], Row], stay: Row, end: float, step: float
) -> tuple[np.ndarray, np.ndarray, datetime]:
    bins = int(end / step + 1 - 1e-6)
    table = np.zeros((bins, 17))
    observed = np.zeros((bins, 17), int)
    known: dict[tuple[int, int], datetime] = {}
    for (t, v), event in sorted(values.items(), key=lambda pair: pair[0]):
        hour = (t - stay["intime"]).total_seconds() / 60.0 / 60
        at = int(hour / step - 1e-6)
        table[at, v], observed[at, v], known[at, v] = event["number"], 1, event["known"]
    for v, channel in enumerate(CHANNELS):
        before = (
            float(channel.levels.index(channel.normal)) if channel.levels else float(channel.normal)
        )
        for at in range(bins):
            if observed[at, v]:
                before = table[at, v]
            table[at, v] = before
    return table, observed, max(known.values())


@cache
def assigned(folder: Path, code: bool) -> tuple[list[Row], dict[str, list[Row]], set[str]]:
    """The cohort, the events of each stay, and the subjects with any text among their values."""
    stays = cohort(folder, code)
    by_subject = defaultdict(list)
    for stay in stays:
        by_subject[stay["subject_id"]].append(stay)
    of_stay: dict[str, list[Row]] = defaultdict(list)
    textual = set()
    for event in read_events(folder, code):
        for stay in stays_of_event(event, by_subject[event["subject"]], code):
            if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", event["text"]):
                textual.add(event["subject"])
            if code or plausible(event, stay):
                of_stay[stay["stay_id"]].append(event)
    return stays, of_stay, textual


def reference(
    folder: Path, code: bool, window: float | None, min_los: float, step: float
) -> dict[int, Row]:
    stays, of_stay, textual = assigned(folder, code)
    samples = {}
    for stay in stays:
        if not stay["coded"] or stay["hours"] < min_los - 1e-6:
            continue
        end = stay["hours"] if window is None else min(window, stay["hours"])
        predicted = stay["outtime"] if window is None else stay["intime"] + timedelta(hours=window)
        at_time = known_values(of_stay[stay["stay_id"]], stay, end, predicted, code)
        values = {
            key: winner(events, stay["subject_id"] in textual, code)
            for key, events in at_time.items()
        }
        if not code:
            with_total(values)
        if values:
            table, observed, known = discretised(values, stay, end, step)
            samples[int(stay["stay_id"])] = {
                "values": table, "observed": observed, "known": known, "stay": stay,
                "predicted": predicted,
            }  # fmt: skip
    return samples


def known_values(
    events: list[Row], stay: Row, end: float, predicted: datetime, code: bool
) -> dict[tuple[datetime, int], list[Row]]:
    at_time: dict[tuple[datetime, int], list[Row]] = defaultdict(list)
    for event in events:
        hour = (event["t"] - stay["intime"]).total_seconds() / 60.0 / 60
        known = event["t"] if code or not event["store"] else event["store"]
        if not -1e-6 < hour < end + 1e-6 or known > predicted:
            continue
        number = number_of(event, code)
        if number is not None:
            at_time[event["t"], NAMES.index(event["channel"])].append(
                {**event, "number": number, "known": known}
            )
    return at_time


def label_map(folder: Path, config: ExtractConfig) -> dict[str, set[int]]:
    """hadm_id -> labels, one diagnosis row after the other."""
    table: dict[Any, set[int]] = defaultdict(set)
    for version, icd, label in (
        ontology.phenotype_map(config.icd10_map).select("icd_version", "icd_code", "label").rows()
    ):
        table[(version, icd) if config.icd_join == "version_code" else icd].add(label)
    labels: dict[str, set[int]] = defaultdict(set)
    dictionary = {
        row.get("icd_code") or row.get("icd9_code") for row in read(folder, "d_icd_diagnoses")
    }
    for row in read(folder, "diagnoses_icd"):
        version, icd = int(row.get("icd_version") or 9), row.get("icd_code") or row.get("icd9_code")
        if not icd:
            continue
        if config.icd_join == "code":
            if icd in dictionary:
                labels[row["hadm_id"]] |= table[icd]
        elif version == 10 and config.icd10_map == "resolved":
            labels[row["hadm_id"]] |= ontology.resolved_labels(icd)
        else:
            labels[row["hadm_id"]] |= table[version, icd]
    return labels


CASES = [
    (release, preset, task, step)
    for release in ("iii", "iv")
    for preset in ("corrected", "code")
    for task, step in (("phenotyping", 1.0), ("mortality", 1.0))
] + [("iii", "corrected", "phenotyping", 2.0), ("iii", "corrected", "phenotyping_48h", 1.0)]


@pytest.mark.parametrize(("release", "preset", "task", "step"), CASES)
def test_every_stay_of_the_demos_equals_the_literal_reading(
    release: str,
    preset: str,
    task: str,
    step: float,
    demo_tables: Callable[[str], Mapping[str, pl.DataFrame]],
    code_config: ExtractConfig,
) -> None:
    config = code_config if preset == "code" else ExtractConfig(timestep_hours=step)
    spec = task_spec(task)
    expected = reference(
        FOLDERS[release], preset == "code", spec.window_hours, spec.min_los_hours, step
    )
    samples = extract_partition(demo_tables(release), spec, config).samples
    assert samples["stay_id"].n_unique() == samples.height
    assert set(samples["stay_id"]) == set(expected)
    assert samples.height > 50
    labels = label_map(FOLDERS[release], config)
    for row in samples.iter_rows(named=True):
        wanted = expected[row["stay_id"]]
        stay = wanted["stay"]
        observed = np.asarray(row["ehr_observed"]).reshape(-1, 17)
        values = np.asarray(row["ehr"], np.float32).reshape(-1, 17)
        np.testing.assert_array_equal(observed, wanted["observed"])
        np.testing.assert_array_equal(values, wanted["values"].astype(np.float32))
        assert row["ehr_available_at"] == wanted["known"]
        assert row["prediction_time"] == wanted["predicted"]
        assert (row["subject_id"], row["hadm_id"]) == (
            int(stay["subject_id"]), int(stay["hadm_id"]),
        )  # fmt: skip
        assert row["age"] == pytest.approx(stay["age"], rel=1e-6)
        assert row["sex"] == stay["gender"]
        if task == "mortality":
            assert row["labels"] == [float(stay["died"])]
        else:
            assert {i for i, label in enumerate(row["labels"]) if label} == labels[stay["hadm_id"]]


@pytest.mark.parametrize(("release", "deaths"), [("iii", 32), ("iv", 10)])
def test_corrected_deaths_are_those_the_hospital_recorded(
    release: str, deaths: int, demo_tables: Callable[[str], Mapping[str, pl.DataFrame]]
) -> None:
    flags = {
        int(row["hadm_id"]): row["hospital_expire_flag"]
        for row in read(FOLDERS[release], "admissions")
    }
    stays = cohort(FOLDERS[release], code=False)
    assert sum(stay["died"] for stay in stays) == deaths
    for stay in stays:
        assert str(int(stay["died"])) == flags[int(stay["hadm_id"])]
