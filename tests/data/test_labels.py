from __future__ import annotations

import polars as pl
import pytest

from data.errors import InputError
from data.labels import phenotype_labels
from data.switches import ExtractConfig


def diagnoses(*rows: tuple[int, str, int]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=["hadm_id", "icd_code", "icd_version"], orient="row")


def positives(
    table: pl.DataFrame, dictionary: pl.DataFrame | None = None, **switches: str
) -> dict[int, set[int]]:
    labels = phenotype_labels(table, dictionary, ExtractConfig(**switches))
    assert labels.schema == {"hadm_id": pl.Int64, "labels": pl.List(pl.Float32)}
    found = {}
    for hadm_id, row in labels.iter_rows():
        assert len(row) == 25
        assert set(row) <= {0.0, 1.0}
        found[hadm_id] = {label for label, value in enumerate(row) if value}
    return found


def test_labels_of_admissions():
    table = diagnoses(
        (2, "R6521", 10),
        (2, "N179", 10),
        (2, "N179", 10),
        (1, "4019", 9),
        (3, "Z00", 10),
    )
    assert positives(table) == {1: {13}, 2: {0, 23, 24}, 3: set()}


def test_blanks_dots_case_and_young_codes():
    table = diagnoses((1, "i48.20 ", 10), (2, "E87.20", 10), (3, "0389   ", 9), (4, "E780", 10))
    assert positives(table) == {1: {3}, 2: {14}, 3: {23}, 4: {12}}


def test_the_map_switch_changes_labels():
    table = diagnoses((1, "J9601", 10), (2, "I10", 10))
    assert positives(table) == {1: {22}, 2: {13}}
    assert positives(table, icd10_map="forward_last") == {1: set(), 2: {13}}
    assert positives(table, icd10_map="backward_first") == {1: {22}, 2: {16}}


def test_the_join_switch_changes_labels():
    table = diagnoses((1, "4019", 10), (1, "N179", 10), (2, "J9601", 10))
    dictionary = pl.DataFrame({"icd_code": ["4019", "N179"], "icd_version": [9, 10]})
    assert positives(table) == {1: {0}, 2: {22}}
    # Code alone: the version is ignored, and a code the dictionary lacks drops its row.
    assert positives(table, dictionary, icd_join="code") == {1: {0, 13}}


def test_a_code_of_both_versions_in_the_dictionary_changes_nothing():
    table = diagnoses((1, "E8490", 9), (1, "4019", 9))
    dictionary = pl.DataFrame({"icd_code": ["E8490", "E8490", "4019"], "icd_version": [9, 10, 9]})
    assert positives(table, dictionary, icd_join="code") == {1: {13}}


def test_joining_on_the_code_needs_the_dictionary():
    with pytest.raises(InputError, match="dictionary table is missing"):
        phenotype_labels(diagnoses((1, "4019", 9)), None, ExtractConfig(icd_join="code"))


def test_no_diagnoses():
    empty = diagnoses((1, "4019", 9)).clear()
    assert phenotype_labels(empty, None, ExtractConfig()).is_empty()


def test_row_order_does_not_matter():
    table = diagnoses(*((hadm, code, 10) for hadm in (5, 3, 9) for code in ("I10", "J90", "N179")))
    shuffled = table.sample(fraction=1.0, shuffle=True, seed=3)
    config = ExtractConfig()
    expected = phenotype_labels(table, None, config)
    assert phenotype_labels(shuffled, None, config).equals(expected)
