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
        ("History of Present Illness (HPI): cough", "history of present illness"),
        ("Medications upon Admission:", "medications upon admission"),
        ("Major Surgical or Invasive Procedure: None", "major surgical or invasive procedure"),
        ("Diagnosis: AML in his youth", None),
        ("His course was long", None),
        ("Hospital course was long", None),
    ],
)
def test_what_is_a_header(line, header):
    found = header_of(line)
    assert (found and found[0]) == header


@pytest.mark.parametrize(
    "header",
    [
        "DIAGNOSES:  1.",
        "DIAGNOSIS:",
        "IMPRESSION:",
        "Discharge diagnosis:",
        "Final diagnoses:\n",
        "Primary and secondary diagnoses:",
        "2. DISCHARGE DIAGNOSIS:",
        "**FINAL DIAGNOSIS**\n",
        "Hospital course:",
        "HOSPITAL COURSE\n",
        "1.  HOSPITAL COURSE:",
        "[**Hospital 7**] COURSE:",
        "Brief hospital course by problem:",
        "SUMMARY OF HOSPITAL COURSE WITH PERTINENT LABORATORY DATA:",
    ],
)
@pytest.mark.parametrize("headers", ["paper", "wide"])
def test_what_names_the_labels_ends_a_section_however_it_is_written(header, headers):
    """Old and dictated summaries number, star and shout their headers, or write them small."""
    text = f"MEDICATIONS ON ADMISSION:  Aspirin.\n\n{header} Heart failure.\n"
    assert kept_text(text, headers=headers) == "MEDICATIONS ON ADMISSION: Aspirin."


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
    """Sanity check 33."""
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
    # A diagnosis has its group in either system.
    pairs = (("24900", "E089"), ("07054", "B182"), ("07070", "B1920"), ("20936", "C4A9"))
    for icd9, icd10 in (*pairs, ("4359", "G459"), ("1985", "C7951"), ("5180", "J9811")):
        assert femh.of_codes(9, icd9) == femh.of_codes(10, icd10) != (), icd10


QUAN = {
    # Table 2 of Quan et al. (2005) as printed: enhanced ICD-9-CM, then ICD-10.
    "Congestive heart failure": (
        "398.91 402.01 402.11 402.91 404.01 404.03 404.11 404.13 404.91 404.93 425.4-425.5 "
        "425.7-425.9 428",
        "I09.9 I11.0 I13.0 I13.2 I25.5 I42.0 I42.5-I42.9 I43 I50 P29.0",
    ),
    "Cardiac arrhythmias": (
        "426.0 426.10 426.12 426.13 426.7 426.9 427.0-427.4 427.6 427.8-427.9 785.0 996.01 996.04 "
        "V45.0 V53.3",
        "I44.1-I44.3 I45.6 I45.9 I47-I49 R00.0 R00.1 R00.8 T82.1 Z45.0 Z95.0",
    ),
    "Valvular disease": (
        "093.2 394-397 424 746.3-746.6 V42.2 V43.3",
        "A52.0 I05-I08 I09.1 I09.8 I34-I39 Q23.0-Q23.3 Z95.2-Z95.4",
    ),
    "Hypertension, uncomplicated": ("401", "I10"),
    "Hypertension, complicated": ("402-405", "I11-I13 I15"),
    "Other neurological disorders": (
        "331.9 332.0 332.1 333.4 333.5 333.92 334-335 336.2 340 341 345 348.1 348.3 780.3 784.3",
        "G10-G13 G20-G22 G25.4 G25.5 G31.2 G31.8 G31.9 G32 G35-G37 G40 G41 G93.1 G93.4 R47.0 R56",
    ),
    "Chronic pulmonary disease": (
        "416.8 416.9 490-496 500-505 506.4 508.1 508.8",
        "I27.8 I27.9 J40-J47 J60-J67 J68.4 J70.1 J70.3",
    ),
    "Diabetes w/o chronic complications": (
        "250.0-250.3",
        "E10.0 E10.1 E10.9 E11.0 E11.1 E11.9 E12.0 E12.1 E12.9 E13.0 E13.1 E13.9 E14.0 E14.1 E14.9",
    ),
    "Renal failure": (
        "403.01 403.11 403.91 404.02 404.03 404.12 404.13 404.92 404.93 585 586 588.0 V42.0 V45.1 "
        "V56",
        "I12.0 I13.1 N18 N19 N25.0 Z49.0-Z49.2 Z94.0 Z99.2",
    ),
    "Fluid and electrolyte disorders": ("253.6 276", "E22.2 E86 E87"),
}


def printed(codes: str, version: int) -> set[tuple[int, str]]:
    """The codes of a line of the table, ranges written out."""
    found = set()
    for entry in codes.replace(".", "").split():
        first, _, last = entry.partition("-")
        letter = first[0] if first[0].isalpha() else ""
        numbers = range(int(first[len(letter) :]), int((last or first)[len(letter) :]) + 1)
        width = len(first) - len(letter)
        found |= {(version, f"{letter}{number:0{width}d}") for number in numbers}
    return found


@pytest.mark.parametrize("label", ELIXHAUSER_LABELS)
def test_every_code_of_the_published_table_is_listed_and_no_other(label):
    lists = shipped("elixhauser")
    assert QUAN.keys() == set(ELIXHAUSER_LABELS)
    icd9, icd10 = QUAN[label]
    expected = printed(icd9, 9) | printed(icd10, 10)
    assert set(lists.prefixes[ELIXHAUSER_LABELS.index(label)]) == expected


def test_the_ten_groups_are_those_that_the_paper_names_in_its_order():
    named = (
        "Hypertension, Diabetes, Heart disease, Cancer, Cerebrovascular disease, Kidney disease, "
        "Liver disease, Asthma, Hyperlipidemia, Lung disease"
    )
    assert ", ".join(shipped("femh").labels) == named


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
        ("labels:\n  A: {icd9: ['401']}\n  A: {icd9: ['402']}", "'A' stands twice.* line 3"),
        ("labels:\n  A: {icd9: ['401'], icd9: ['402']}", "'icd9' stands twice"),
        ("labels:\n  1: {icd9: ['401']}\n  '1': {icd9: ['402']}", "1 is no text; put it in quotes"),
        ("labels:\n  no: {icd9: ['401']}", "False is no text; put it in quotes"),
        ("labels:\n  '  ': {icd9: ['401']}", "a label without a name"),
        ("labels:\n  A: {icd9: ['401']}\nhierarchy: []", "hierarchy: give a mapping"),
        ("labels:\n  A: {icd9: ['I50']}", "'I50' is no code of icd9, whose codes begin with"),
        ("labels:\n  A: {icd10: ['4280']}", "'4280' is no code of icd10, whose codes begin with"),
    ],
)
def test_a_label_file_with_a_fault_is_refused(tmp_path, body, needle):
    path = tmp_path / "labels.yaml"
    path.write_text(body)
    with pytest.raises(InputError, match=needle) as caught:
        load_code_lists(path)
    assert str(path) in str(caught.value)


def test_a_code_may_stand_in_two_labels_and_twice_in_one(tmp_path):
    path = tmp_path / "labels.yaml"
    path.write_text("labels:\n  A: {icd9: ['4280', '428']}\n  B: {icd9: ['428.0'], icd10: ['I50']}")
    lists = load_code_lists(path)
    assert lists.of_codes(9, "4280") == (0, 1)
    assert lists.of_codes(9, "4281") == (0,)
    assert lists.of_codes(10, "I509") == (1,)


def test_a_missing_label_file_names_its_switch(tmp_path):
    with pytest.raises(InputError, match=r"data\.extract\.admissions\.label_file"):
        load_code_lists(tmp_path / "none.yaml")
