"""Sections of real and malformed notes, the sentence of results, units, and label files."""

from __future__ import annotations

import time
from pathlib import Path

import polars as pl
import pytest

from data.code_lists import load_code_lists, shipped
from data.errors import InputError
from data.lab_text import Result, read_lab_text, write_lab_text
from data.lab_units import conversion, unit_name
from data.sections import SECTIONS, admission_sections, header_of, kept_text
from data.tasks import ELIXHAUSER_LABELS, FEMH_LABELS

NOTES = Path(__file__).parents[2] / "fixtures" / "notes"


def real_notes() -> list[dict[str, str]]:
    return pl.read_csv(NOTES / "aci_bench_excerpt.csv").to_dicts()


@pytest.mark.parametrize("row", real_notes(), ids=lambda row: row["encounter_id"])
def test_sections_of_real_notes(row):
    """CC BY notes: each section begins with its header and holds its text up to the next header."""
    found = admission_sections(row["note"], "wide")
    expected = {kind: row[kind] for kind in SECTIONS if row[kind]}
    headers = {kind: text.split("\n", 1)[0].strip(" :") for kind, text in found.items()}
    assert headers == expected
    for section in found.values():
        assert "".join(section.split()) in "".join(row["note"].split())
    whole = kept_text(row["note"], headers="wide")
    for later in ("PHYSICAL EXAM", "REVIEW OF SYSTEMS", "ASSESSMENT", "PLAN", "RESULTS"):
        assert later not in whole
    strict = admission_sections(row["note"], "paper")
    assert strict.keys() <= found.keys()


MIMIC = """Name:  [**Known lastname 1**]      Unit No:   ___

Admission Date:  [**2151-7-16**]

CHIEF COMPLAINT: Chest pain

History of Present Illness:
Mr. [**Known lastname 1**] is a 60 year old man.
In the ED, vitals: 98.1 80.
Of note: he has no fever.
Temperature: 98

Past Medical History:
1. CAD
2. Gout


Social History:
Smokes

Medications on Admission:
Aspirin 81 mg

Brief Hospital Course: He did well.

Discharge Diagnosis:
NSTEMI
"""


def test_a_note_as_mimic_writes_them():
    found = admission_sections(MIMIC)
    assert list(found) == list(SECTIONS)
    assert found["complaint"] == "CHIEF COMPLAINT: Chest pain"
    assert found["present"].split("\n") == [
        "History of Present Illness:",
        "Mr. is a 60 year old man.",
        "In the ED, vitals: 98.1 80.",
        "Of note: he has no fever.",
        "Temperature: 98",
    ]
    assert found["past"] == "Past Medical History:\n1. CAD\n2. Gout"
    assert found["medications"] == "Medications on Admission:\nAspirin 81 mg"
    text = kept_text(MIMIC)
    assert "[**" not in text
    assert "NSTEMI" not in text
    assert "Course" not in text
    assert "NSTEMI" in kept_text(MIMIC, sections="all")


@pytest.mark.parametrize(
    ("line", "header"),
    [
        ("Present Illness:", "present illness"),
        ("  Past Medical History :", "past medical history"),
        ("MEDICATIONS ON ADMISSION:  none", "medications on admission"),
        ("ALLERGIES", "allergies"),
        ("no header:", None),
        ("1. Aspirin: daily", None),
        ("He said: it hurts", None),
        ("", None),
        (":", None),
        ("A" * 500, None),
        ("病史：", None),
    ],
)
def test_what_is_a_header(line, header):
    found = header_of(line)
    assert (found and found[0]) == header


@pytest.mark.parametrize(
    "text",
    ["", "\n\n", "no section at all", "Chief Complaint:\n\nDischarge Diagnosis:\nX", "\x00\x00"],
)
def test_notes_without_the_sections_give_nothing(text):
    assert kept_text(text) == ""


def test_other_scripts_null_bytes_and_line_ends_survive():
    text = "Chief Complaint:\r\n胸痛\x00 و ألم 😀\r\nPast Medical History:\rДиабет"
    assert kept_text(text) == "Chief Complaint:\n胸痛 و ألم 😀\nPast Medical History:\nДиабет"


@pytest.mark.parametrize(
    "unit",
    ["x" * 100, "Chief Complaint:\nA\n", "[**", "A: ", "word " * 20 + "\n", "Aa " * 7 + ":\n"],
)
def test_ten_megabytes_take_time_in_their_length_only(unit):
    def seconds(size: int) -> float:
        text = "Chief Complaint:\n" + unit * (size // len(unit))
        start = time.process_time()
        assert len(kept_text(text)) <= size + 100
        return time.process_time() - start

    seconds(1_000)
    assert seconds(10_000_000) < 60


def test_the_sentence_of_results_can_be_read_back():
    results = [
        Result("Sodium", "128", "mEq/L"),
        Result("Calcium, Total", "7.1", "mg/dL"),
        Result("pH", "7.2", ""),
        Result("Bacteria", ">100", "#/hpf"),
    ]
    text = write_lab_text(results)
    assert text == (
        "These are abnormal results recorded: ITEMID Sodium: 128 mEq/L; ITEMID Calcium, Total: "
        "7.1 mg/dL; ITEMID pH: 7.2; ITEMID Bacteria: >100 #/hpf;"
    )
    assert read_lab_text(text) == results
    odd = write_lab_text([Result("a:b;c\n", "1 ; 2", "x;y")])
    assert read_lab_text(odd) == [Result("a,b,c", "1,2", "x,y")]


def test_units():
    assert unit_name(" K/µL ") == unit_name("x10^9/L") == "k/ul"
    assert conversion("Sodium", "mmol/L") == ("meq/l", 1.0)
    target, factor = conversion("Glucose", "mmol/L")
    assert target == "mg/dl"
    assert 5.5 * factor == pytest.approx(99.1, abs=0.1)
    assert conversion("Creatinine", "umol/L")[1] * 88.42 == pytest.approx(1.0)
    assert conversion("Hemoglobin", "g/L") == ("g/dl", 0.1)
    assert conversion("Anything", "furlong") == ("furlong", 1.0)
    assert conversion("Anything", None) == ("", 1.0)


def test_the_shipped_lists_are_those_of_the_tasks():
    assert shipped("elixhauser").labels == ELIXHAUSER_LABELS
    assert shipped("femh").labels == FEMH_LABELS
    elixhauser = shipped("elixhauser")
    named = {
        (9, "40301"): {"Renal failure", "Hypertension, complicated"},
        (9, "40211"): {"Congestive heart failure", "Hypertension, complicated"},
        (9, "4019"): {"Hypertension, uncomplicated"},
        (9, "25002"): {"Diabetes w/o chronic complications"},
        (9, "25040"): set(),
        (9, "42731"): {"Cardiac arrhythmias"},
        (9, "2760"): {"Fluid and electrolyte disorders"},
        (9, "49121"): {"Chronic pulmonary disease"},
        (9, "V560"): {"Renal failure"},
        (9, "4240"): {"Valvular disease"},
        (9, "3320"): {"Other neurological disorders"},
        (10, "I132"): {"Congestive heart failure", "Hypertension, complicated"},
        (10, "I120"): {"Renal failure", "Hypertension, complicated"},
        (10, "4019"): set(),
    }
    for (version, code), labels in named.items():
        found = {ELIXHAUSER_LABELS[k] for k in elixhauser.of_codes(version, code)}
        assert found == labels, code
    femh = shipped("femh")
    assert [FEMH_LABELS[k] for k in femh.of_codes(10, "I219")] == ["Heart disease"]
    assert [FEMH_LABELS[k] for k in femh.of_codes(10, "C509")] == ["Cancer"]
    assert [FEMH_LABELS[k] for k in femh.of_codes(9, "49390")] == ["Asthma"]


@pytest.mark.parametrize(
    ("body", "needle"),
    [
        ("labels:\n  A: {icd11: ['1A00']}", "unknown code system 'icd11'"),
        ("labels:\n  A: {icd9: [401]}", "leading zeros"),
        ("labels:\n  A: {icd9: ['4-01']}", "neither a code"),
        ("labels:\n  A: {icd9: ['I20-J25']}", "neither a code"),
        ("labels:\n  A: {icd9: '401'}", "list of codes"),
        ("labels:\n  A: []", "icd9 or icd10"),
        ("labels: {}", "no mapping `labels`"),
        ("names: {}", "no mapping `labels`"),
        ("labels:\n  A: {icd9: ['401']}\nextra: 1", "unknown key 'extra'"),
        ("labels:\n  A: {icd9: ['401']}\nhierarchy:\n  B: {icd9: ['402']}", "no label of the file"),
        ("labels: [", "not readable as YAML"),
    ],
)
def test_a_label_file_with_a_fault_is_refused(tmp_path, body, needle):
    path = tmp_path / "labels.yaml"
    path.write_text(body)
    with pytest.raises(InputError, match=needle) as caught:
        load_code_lists(path)
    assert str(path) in str(caught.value)


def test_a_missing_label_file_names_its_switch(tmp_path):
    with pytest.raises(InputError, match=r"data\.extract\.admissions\.label_file"):
        load_code_lists(tmp_path / "none.yaml")
