from __future__ import annotations

import errno
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import cache as row_cache
from data.errors import InputError
from data.manifest import Manifest
from data.reader import ShardReader

ROOT = Path(__file__).resolve().parents[2]


def _rows(folder):
    manifest = Manifest.load(folder)
    tables = [pq.read_table(folder / file.name) for file in manifest.files]
    return pa.concat_tables(tables).to_pylist()


@pytest.mark.parametrize("task", ["mortality", "phenotyping", "radiology"])
def test_every_column_of_every_row_comes_back(make_shards, tmp_path, task, monkeypatch):
    monkeypatch.setattr(row_cache, "CACHE_ROWS", 7)
    make_shards(tmp_path / "s", rows=31, task=task, image_size=64, shards=3)
    reader = ShardReader(tmp_path / "s", tmp_path / "c")
    expected = _rows(tmp_path / "s")
    assert len(reader) == len(expected) == 31
    assert len(reader._chunks) > 3
    keys = reader.keys().to_pylist()
    for row, want in enumerate(expected):
        assert keys[row]["row"] == row
        for name in ("subject_id", "stay_id", "dicom_id", "prediction_time", "split", "labels"):
            assert keys[row][name] == want[name]
        assert keys[row]["has_ehr"] == (want["ehr"] is not None)
        assert keys[row]["has_cxr"] == (want["cxr"] is not None)
        if want["cxr"] is not None:
            assert reader.image(row) == want["cxr"]
        assert reader.cxr_labels[row].tolist() == (want["cxr_labels"] or [0.0] * 14)
        assert reader.labels[row].tolist() == want["labels"]


def test_series_of_any_rows_in_any_order(make_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(row_cache, "CACHE_ROWS", 7)
    make_shards(tmp_path / "s", rows=31, task="phenotyping", image_size=64)
    reader = ShardReader(tmp_path / "s", tmp_path / "c")
    expected = _rows(tmp_path / "s")
    rows = np.array([30, 2, 2, 17, 8])
    for cut in (None, 5):
        series = reader.series(rows, cut)
        lengths = [min(len(expected[row]["ehr"]) // 17, cut or 999) for row in rows]
        assert series.lengths.tolist() == lengths
        for column, found in (("ehr", series.values), ("ehr_observed", series.observed)):
            want = [expected[r][column][: 17 * n] for r, n in zip(rows, lengths, strict=True)]
            assert found.ravel().tolist() == [value for row in want for value in row]


def _late(column, by):
    def edit(rows):
        target = next(row for row in rows[11:] if row["cxr"] is not None)
        target[column] = target["prediction_time"] + by
        edit.row = rows.index(target)

    return edit


@pytest.mark.parametrize("column", ["ehr_available_at", "cxr_available_at"])
def test_a_row_that_knows_the_future_is_refused(make_shards, tmp_path, column):
    edit = _late(column, timedelta(microseconds=1))
    make_shards(tmp_path / "s", rows=30, image_size=64, edit=edit)
    with pytest.raises(InputError, match=f"row {edit.row}, column {column}: later than") as caught:
        ShardReader(tmp_path / "s", tmp_path / "c")
    assert "part-0000" in str(caught.value)
    assert not list((tmp_path / "c").glob("*.arrow*"))
    make_shards(tmp_path / "ok", rows=30, image_size=64, edit=_late(column, timedelta(0)))
    assert len(ShardReader(tmp_path / "ok", tmp_path / "c")) == 30


def _set(index, **columns):
    def edit(rows):
        rows[index] |= columns

    return edit


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"ehr_available_at": None}, "row 4, column ehr_available_at: null beside observed"),
        ({"prediction_time": None}, "row 4, column prediction_time: null"),
        ({"labels": [1.0, 0.0]}, "row 4, column labels: not 1 labels"),
        ({"ehr": [0.0] * 34}, "row 4, column ehr_observed: the series and its mask"),
        ({"ehr": [0.5] * 48 * 17}, "row 4, column ehr: a level index"),
        ({"ehr": [99.0] * 48 * 17}, "row 4, column ehr: a level index"),
        ({"ehr": [float("nan")] * 48 * 17}, "row 4, column ehr: a value that is not finite"),
        ({"ehr": [], "ehr_observed": []}, "row 4, column ehr: an empty series"),
        ({"ehr_observed": [2] * 48 * 17}, "row 4, column ehr_observed: a mask that is not 0 or 1"),
        ({"ehr": None, "ehr_observed": None, "cxr": None}, "neither a series nor an image"),
        ({"cxr_labels": [1.0]}, "row 4, column cxr_labels: not 14 labels"),
    ],
)
def test_a_malformed_row_is_refused_by_name(make_shards, tmp_path, columns, message):
    make_shards(tmp_path / "s", rows=8, image_size=64, edit=_set(4, **columns))
    with pytest.raises(InputError, match=message):
        ShardReader(tmp_path / "s", tmp_path / "c")


def test_a_shard_altered_after_its_manifest_is_refused(make_shards, tmp_path):
    manifest = make_shards(tmp_path / "s", rows=20, image_size=64)
    path = tmp_path / "s" / manifest.files[1].name
    ShardReader(tmp_path / "s", tmp_path / "c")
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    for cache in ("c", "fresh"):
        with pytest.raises(InputError, match=r"part-00001.parquet: altered after its manifest"):
            ShardReader(tmp_path / "s", tmp_path / cache)
    path.write_bytes(whole)
    assert len(ShardReader(tmp_path / "s", tmp_path / "c")) == 20
    path.unlink()
    with pytest.raises(InputError, match=r"part-00001.parquet: missing"):
        ShardReader(tmp_path / "s", tmp_path / "c")


def test_other_columns_than_the_schema_are_refused(make_shards, tmp_path):
    from data.files import sha256_file

    manifest = make_shards(tmp_path / "s", rows=20, image_size=64)
    path = tmp_path / "s" / manifest.files[0].name
    table = pq.read_table(path).drop_columns(["ehr_observed"])
    pq.write_table(table, path)
    files = (
        manifest.files[0].model_copy(update={"sha256": sha256_file(path)}),
        *manifest.files[1:],
    )
    manifest.model_copy(update={"files": files}).write(tmp_path / "s")
    with pytest.raises(InputError, match=r"00000\.parquet: column ehr_observed is missing"):
        ShardReader(tmp_path / "s", tmp_path / "c")


def test_a_full_disk_leaves_no_cache_and_says_what_to_change(make_shards, tmp_path, monkeypatch):
    make_shards(tmp_path / "s", rows=20, image_size=64)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(row_cache, "check_rows", full)
    with pytest.raises(InputError, match=r"disk full .* data.batches.cache_dir"):
        ShardReader(tmp_path / "s", tmp_path / "c")
    assert [path.suffix for path in (tmp_path / "c").iterdir()] == [".lock"]


def test_two_processes_at_once_build_one_cache(make_shards, tmp_path):
    make_shards(tmp_path / "s", rows=60, image_size=128)
    code = (
        "import logging, sys; from pathlib import Path; from data.reader import ShardReader\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "print(len(ShardReader(Path(sys.argv[1]), Path(sys.argv[2]))))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "s"), str(tmp_path / "c")]
    both = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [out.strip() for out, _ in outputs] == ["60", "60"]
    assert sum("caching 60 rows" in log for _, log in outputs) == 1
    names = sorted(path.suffix for path in (tmp_path / "c").iterdir())
    assert names == [".arrow", ".json", ".lock"]
    arrow = next((tmp_path / "c").glob("*.arrow"))
    assert arrow.stat().st_mode & 0o077 == 0


def test_new_shards_of_the_same_folder_get_a_cache_of_their_own(make_shards, tmp_path):
    make_shards(tmp_path / "s", rows=20, image_size=64, seed=0)
    first = ShardReader(tmp_path / "s", tmp_path / "c")
    make_shards(tmp_path / "s", rows=20, image_size=64, seed=1)
    second = ShardReader(tmp_path / "s", tmp_path / "c")
    assert first.cache != second.cache
    assert not np.array_equal(first.series(np.arange(3)).values, second.series(np.arange(3)).values)


def test_a_damaged_cache_says_which_file_to_delete(make_shards, tmp_path):
    make_shards(tmp_path / "s", rows=20, image_size=64)
    cache = ShardReader(tmp_path / "s", tmp_path / "c").cache
    cache.write_bytes(cache.read_bytes()[:1000])
    with pytest.raises(InputError, match=f"{cache.name}: damaged row cache .*; delete it"):
        ShardReader(tmp_path / "s", tmp_path / "c")


def test_the_default_cache_folder_is_for_its_user_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(row_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    (own,) = {row_cache.default_folder().parent}
    own.chmod(0o777)
    assert row_cache.default_folder().parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(row_cache.os, "getuid", lambda: 12345)
    (tmp_path / "rayfuse-12345").mkdir()
    with pytest.raises(InputError, match="belongs to another user"):
        row_cache.default_folder()
