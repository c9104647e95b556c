from __future__ import annotations

import gzip
from datetime import datetime

import polars as pl
import pytest

from data.errors import InputError
from data.sources.notes import DISCHARGE, NOTE_SCHEMA, find_notes, read_notes

SECRET = 'Name: ___\nHe said "it hurts, here".\nUnit No: [**12345**]'
QUOTED = '"' + SECRET.replace('"', '""') + '"'
IV = (
    "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text\n"
    f"a-DS-1,10000032,22595853,DS,1,2180-05-07 00:00:00,2180-05-09 15:26:00,{QUOTED}\n"
    "b-DS-2,10000084,,DS,2,2160-11-25 00:00:00,,short\n"
)
III = (
    '"ROW_ID","SUBJECT_ID","HADM_ID","CHARTDATE","CHARTTIME","STORETIME","CATEGORY",'
    '"DESCRIPTION","CGID","ISERROR","TEXT"\n'
    f'1,22532,167853,2151-08-04,,,"Discharge summary","Report",,,{QUOTED}\n'
    '2,22532,167853,2151-08-04,2151-08-04 10:00:00,2151-08-04 11:00:00,"Echo ","R",1,,"x"\n'
    '3,22532,167853,2151-08-04,2151-08-04 12:00:00,,"Nursing","R",1,"1","entered in error"\n'
)


def frames(folder, **options) -> pl.DataFrame:
    (file,) = find_notes(folder)
    return pl.concat(read_notes(file, **options))


def test_mimic_iv_notes(tmp_path):
    (tmp_path / "note").mkdir()
    (tmp_path / "note" / "discharge.csv.gz").write_bytes(gzip.compress(IV.encode()))
    table = frames(tmp_path)
    assert table.schema == NOTE_SCHEMA
    first, second = table.rows(named=True)
    assert first["text"] == SECRET
    assert first["category"] == DISCHARGE
    assert first["storetime"] == datetime.fromisoformat("2180-05-09T15:26:00")
    assert second["hadm_id"] is None is second["storetime"]


def test_mimic_iii_notes(tmp_path):
    (tmp_path / "NOTEEVENTS.csv").write_text(III)
    table = frames(tmp_path)
    assert table["category"].to_list() == [DISCHARGE, "Echo"]
    # Only the day is known: the note must not seem known before its end.
    assert table["charttime"][0] == datetime.fromisoformat("2151-08-04T23:59:59")
    assert table["charttime"][1] == datetime.fromisoformat("2151-08-04T10:00:00")
    assert table["text"][0] == SECRET


@pytest.mark.parametrize("batch_rows", [1, 2, 3, 100])
def test_batches_do_not_change_the_notes(tmp_path, batch_rows):
    (tmp_path / "NOTEEVENTS.csv").write_text(III)
    assert frames(tmp_path, batch_rows=batch_rows).equals(frames(tmp_path))


def test_parquet_reads_the_same(tmp_path):
    (tmp_path / "csv").mkdir()
    (tmp_path / "parquet").mkdir()
    (tmp_path / "csv" / "discharge.csv").write_text(IV)
    typed = pl.read_csv(IV.encode(), try_parse_dates=True)
    assert typed.schema["charttime"] == pl.Datetime("us")
    typed.write_parquet(tmp_path / "parquet" / "discharge.parquet")
    assert frames(tmp_path / "parquet").equals(frames(tmp_path / "csv"))


def test_only_the_asked_subjects(tmp_path):
    (tmp_path / "discharge.csv").write_text(IV)
    assert frames(tmp_path, subjects=pl.Series([10000084]))["text"].to_list() == ["short"]
    assert frames(tmp_path, subjects=pl.Series([1])).is_empty()


def test_both_tables_of_mimic_iv_are_found(tmp_path):
    (tmp_path / "radiology.csv").write_text(IV)
    (tmp_path / "discharge.csv").write_text(IV)
    (tmp_path / "discharge_detail.csv").write_text("x")
    assert [file.table for file in find_notes(tmp_path)] == ["discharge", "radiology"]
    assert {file.release for file in find_notes(tmp_path)} == {"mimic-iv-note"}


FAULTS = {
    "no_column": (IV.replace("charttime", "time").encode(), "no column charttime"),
    "delimiter": (IV.replace(",", ";").encode(), "no column subject_id"),
    "time": (IV.replace("2160-11-25", "25/11/60").encode(), "note 2: charttime is no time"),
    "id": (IV.replace("10000084", "x").encode(), "note 2: subject_id is no integer"),
    "latin1": (IV.replace("short", "na\u00efve").encode("latin-1"), "not UTF-8"),
    "open_quote": (IV.replace('"\n', "\n").encode(), "open quote"),
    "ragged": (IV.replace("short", "short,more").encode(), "other fields than the header"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_name_the_place_and_never_the_text(tmp_path, kind):
    raw, message = FAULTS[kind]
    (tmp_path / "discharge.csv").write_bytes(raw)
    with pytest.raises(InputError, match=message) as caught:
        frames(tmp_path)
    assert "discharge.csv" in str(caught.value)
    shown = repr(caught.value) + repr(caught.value.__cause__)
    assert "hurts" not in shown
    assert "short" not in shown


def test_a_cut_gzip(tmp_path):
    body = IV + "".join(f"c,{n},1,DS,1,,,{hash(str(n))}\n" for n in range(5_000))
    packed = gzip.compress(body.encode())
    (tmp_path / "discharge.csv.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match="the gzip file is cut off or damaged after note"):
        frames(tmp_path)


def test_no_notes(tmp_path):
    with pytest.raises(InputError, match="no table of notes"):
        find_notes(tmp_path)
