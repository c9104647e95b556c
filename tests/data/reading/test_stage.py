"""Staging: complete, in partitions of whole subjects, resumable, hashed."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pytest

from data import stage as staging
from data.errors import InputError
from data.events import item_ids
from data.files import sha256_file
from data.sources.canonical import TABLES
from data.sources.release import open_release
from data.stage import Stage, load_stage, load_tables, partition_of, stage

if TYPE_CHECKING:
    from collections.abc import Callable

DEMO = Path(__file__).parents[3] / "data" / "demo"


def _splitmix(value: int) -> int:
    """The published generator's output step, on Python integers."""
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def test_partitions_are_splitmix64_and_even() -> None:
    subjects = np.arange(10_000_000, 10_050_000)
    parts = partition_of(subjects, 7)
    assert parts[:500].tolist() == [_splitmix(int(subject)) % 7 for subject in subjects[:500]]
    assert np.bincount(parts, minlength=7).min() > 0.95 * len(subjects) / 7


def _all_rows(folder: Path, staged: Stage) -> dict[str, pl.DataFrame]:
    parts = [load_tables(folder, staged.files_of(part)) for part in range(staged.partitions)]
    tables = {name: pl.concat([part[name] for part in parts]) for name in TABLES}
    return {**tables, "icd_dictionary": parts[0]["icd_dictionary"]}


@pytest.mark.parametrize("release", ["mimic-iv", "mimic-iii"])
def test_the_real_demos_are_staged_whole(tmp_path: Path, release: str) -> None:
    staged = stage(DEMO / release, tmp_path / "staged", partitions=4)
    tables = _all_rows(tmp_path / "staged", staged)
    raw = DEMO / release / ("hosp/patients.csv.gz" if release == "mimic-iv" else "PATIENTS.csv.gz")
    assert tables["patients"].height == pl.read_csv(raw).height == 100
    events = tables["events"]
    assert set(events["itemid"]) <= item_ids(staged.release)
    by_source = dict(events["source"].value_counts().rows())
    kept = {table.table: table.rows_kept for table in staged.tables}
    assert by_source["chart"] == kept["chartevents"]
    assert by_source["lab"] == kept["labevents"]
    stays = set(tables["icustays"]["subject_id"])
    assert set(events["subject_id"]) <= stays
    assert set(tables["diagnoses"]["subject_id"]) <= stays


def test_a_subject_is_in_one_partition_and_rows_keep_their_order(
    tmp_path: Path, make_hospital: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_FLUSH_ROWS", 200)
    small_blocks = functools.partial(staging.TableReader, block_bytes=9_000)
    monkeypatch.setattr(staging, "TableReader", small_blocks)
    staged = stage(make_hospital(tmp_path / "raw"), tmp_path / "out", partitions=3)
    seen: dict[int, int] = {}
    for part in range(3):
        tables = load_tables(tmp_path / "out", staged.files_of(part))
        for name, table in tables.items():
            if "subject_id" in table.columns:
                for subject in table["subject_id"].unique():
                    assert seen.setdefault(subject, part) == part, name
        chart = tables["events"].filter(pl.col("source") == "chart")
        assert chart["row"].is_sorted()
    assert len(seen) == 12
    flushes = {file.name[-13:] for part in range(3) for file in staged.files_of(part)}
    assert len(flushes) > 3


def test_form_case_and_order_of_rows_give_the_same_files(
    tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    hashes = []
    for number, options in enumerate(({}, {"form": "parquet"}, {"form": "csv", "upper": True})):
        folder = make_hospital(tmp_path / f"raw{number}", **options)
        staged = stage(folder, tmp_path / f"out{number}", partitions=2)
        hashes.append([file.sha256 for table in staged.tables for file in table.files])
    assert hashes[0] == hashes[1] == hashes[2]


def test_a_killed_stage_reads_only_what_is_missing(
    tmp_path: Path, make_hospital: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_hospital(tmp_path / "raw")
    expected = stage(folder, tmp_path / "whole", partitions=2)
    opened: list[str] = []
    reader = staging.TableReader

    def failing(file, spec, **options):
        opened.append(spec.table)
        if spec.table == "labevents" and opened.count("labevents") == 1:
            raise KeyboardInterrupt
        return reader(file, spec, **options)

    monkeypatch.setattr(staging, "TableReader", failing)
    with pytest.raises(KeyboardInterrupt):
        stage(folder, tmp_path / "out", partitions=2)
    assert not (tmp_path / "out").exists()
    assert stage(folder, tmp_path / "out", partitions=2) == expected
    assert opened.count("chartevents") == 1
    assert opened.count("labevents") == 2
    assert not list(tmp_path.glob(".out.*"))
    stage(folder, tmp_path / "out", partitions=2)
    assert opened.count("labevents") == 2


def test_a_fault_leaves_nothing_under_the_name(
    tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    folder = make_hospital(tmp_path / "raw")
    path = folder / "icu" / "chartevents.csv.gz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="truncated gzip"):
        stage(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_altered_staged_file_is_named(
    tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    staged = stage(make_hospital(tmp_path / "raw"), tmp_path / "out", partitions=1)
    name = next(file.name for file in staged.files_of(0) if file.into == "events")
    path = tmp_path / "out" / name
    frame = pl.read_parquet(path)
    frame.head(frame.height - 1).write_parquet(path)
    assert sha256_file(path)
    with pytest.raises(InputError, match=f"{name}: altered or missing"):
        load_tables(tmp_path / "out", staged.files_of(0))


def test_other_contents_other_partitions_other_items_are_refused(
    tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    first = make_hospital(tmp_path / "a")
    stage(first, tmp_path / "out", partitions=2)
    with pytest.raises(InputError, match="choose another --out"):
        stage(first, tmp_path / "out", partitions=3)
    with pytest.raises(InputError, match="choose another --out"):
        stage(make_hospital(tmp_path / "b", seed=1), tmp_path / "out", partitions=2)
    path = tmp_path / "out" / "stage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "items": "0"}))
    with pytest.raises(InputError, match="another list of item ids"):
        load_stage(tmp_path / "out")


def test_staged_and_raw_have_one_fingerprint(
    tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    folder = make_hospital(tmp_path / "raw")
    assert stage(folder, tmp_path / "out").fingerprint == open_release(folder).fingerprint
