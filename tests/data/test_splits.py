from __future__ import annotations

import subprocess
import sys

import polars as pl
import pytest

from data.errors import InputError
from data.splits import assign_split, subject_position
from data.switches import Split


def subjects(count: int) -> pl.Series:
    return pl.Series("subject_id", range(10_000_000, 10_000_000 + count))


def write_lists(folder, val: str, test: str) -> Split:
    (folder / "val.csv").write_text(val)
    (folder / "test.csv").write_text(test)
    return Split(val_subjects=folder / "val.csv", test_subjects=folder / "test.csv")


def test_fractions_are_met_and_no_subject_has_two_splits():
    ids = subjects(20_000)
    split = assign_split(pl.concat([ids, ids.reverse()]), Split())
    shares = split.value_counts(normalize=True)
    share = dict(shares.rows())
    assert share == pytest.approx({"train": 0.7, "val": 0.1, "test": 0.2}, abs=0.01)
    assert split[:20_000].to_list() == split[20_000:].reverse().to_list()


def test_fractions_and_seed_decide():
    ids = subjects(5_000)
    assert set(assign_split(ids, Split(fractions=(0.0, 0.0, 1.0)))) == {"test"}
    assert set(assign_split(ids, Split(fractions=(0.5, 0.0, 0.5)))) == {"train", "test"}
    other = assign_split(ids, Split(seed=1))
    agreement = (assign_split(ids, Split()) == other).mean()
    assert 0.45 < agreement < 0.65  # 0.7^2 + 0.1^2 + 0.2^2 = 0.54 if independent


def test_a_subject_keeps_its_split_among_others():
    few = subjects(7)
    assert (
        assign_split(few, Split()).to_list() == assign_split(subjects(900), Split())[:7].to_list()
    )


def test_positions_are_the_same_in_another_process_and_pinned():
    code = "from data.splits import subject_position; print(subject_position(10000032, 0))"
    printed = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7"},
    )
    assert float(printed.stdout) == subject_position(10000032, 0)
    # A changed number would move patients between the splits of every published cohort.
    assert subject_position(10000032, 0) == pytest.approx(0.08844669232722463, abs=1e-15)


def test_no_subjects():
    assert assign_split(pl.Series("subject_id", [], dtype=pl.Int64), Split()).to_list() == []


def test_lists_given_as_text_match_integer_ids(tmp_path):
    split = write_lists(tmp_path, "subject_id,flag\n 2 ,1\n", 'flag,SUBJECT_ID\n1,"3"\n1,4\n')
    assigned = assign_split(pl.Series([1, 2, 3, 4, 2]), split)
    assert assigned.to_list() == ["train", "val", "test", "test", "val"]


@pytest.mark.parametrize(
    ("val", "test", "message"),
    [
        ("subject_id\n2\n", "subject_id\n2\n3\n", "both lists .subject_id 2.*one split"),
        ("subject_id\n", "subject_id\n3\n", "val.csv: lists no subject"),
        ("patient\n2\n", "subject_id\n3\n", "val.csv: no column subject_id .found: patient"),
        ("subject_id\n2\nx7\n", "subject_id\n3\n", "row 3: subject_id 'x7' is no integer"),
    ],
)
def test_wrong_lists_are_refused(tmp_path, val, test, message):
    with pytest.raises(InputError, match=message):
        assign_split(pl.Series([1, 2]), write_lists(tmp_path, val, test))


def test_a_missing_list_is_refused(tmp_path):
    split = Split(val_subjects=tmp_path / "no.csv", test_subjects=tmp_path / "no.csv")
    with pytest.raises(InputError, match=r"no\.csv: no such file"):
        assign_split(pl.Series([1]), split)
