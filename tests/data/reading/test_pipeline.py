"""The extraction as a product: whole or not at all, resumable, the same from every form."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from data import pipeline
from data.check import check
from data.errors import InputError
from data.manifest import Manifest
from data.schema import SHARD_SCHEMA
from data.stage import load_tables, stage
from data.switches import ExtractConfig, Sources

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.ray

DEMO = Path(__file__).parents[3] / "data" / "demo"
TWO = ExtractConfig(partitions=2)


def _extract(folder: Path, out: Path, task: str = "mortality", config: ExtractConfig = TWO):
    return pipeline.extract(Sources(mimic_iv=folder), task, config, out, preset="corrected")


def _shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "shards").iterdir())}


@pytest.fixture(scope="module")
def extracted(
    tmp_path_factory: pytest.TempPathFactory,
    make_hospital: Callable[..., Path],
    ray_session: None,
) -> tuple[Path, Path]:
    """A raw folder and the finished extraction of it."""
    folder = make_hospital(tmp_path_factory.mktemp("raw"))
    out = tmp_path_factory.mktemp("shards") / "out"
    _extract(folder, out)
    return folder, out


def test_the_output_is_sound_and_private(extracted: tuple[Path, Path]) -> None:
    _, out = extracted
    manifest = Manifest.load(out)
    assert check(out) == []
    assert manifest.rows == 12
    assert manifest.release == "mimic-iv-2.x"
    assert manifest.splits["train"] > 0
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "shards"]
    assert not list(out.parent.glob(".out*"))
    for file in manifest.files:
        assert pq.read_schema(out / file.name).equals(SHARD_SCHEMA)
    read = {step.rule: step for step in manifest.flow}["chartevents read"]
    assert read.rows_in * 5 == read.rows_out * 6
    died = pl.read_parquet(out / "shards" / "*.parquet")["labels"].list.first().sum()
    share = sum(manifest.prevalence[name][0] * rows for name, rows in manifest.splits.items())
    assert died == round(share) == 3


def test_raw_staged_parquet_and_shuffled_rows_give_the_same_shards(
    extracted: tuple[Path, Path], tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    folder, out = extracted
    expected = _shards(out)
    stage(folder, tmp_path / "staged", partitions=2)
    staged = _extract(tmp_path / "staged", tmp_path / "a", config=ExtractConfig())
    assert _shards(tmp_path / "a") == expected
    assert staged == Manifest.load(out)

    def shuffle(tables: dict) -> None:
        rng = np.random.default_rng(3)
        for rows in tables.values():
            rng.shuffle(rows)

    shuffled = make_hospital(tmp_path / "b", form="parquet", upper=True, edit=shuffle)
    _extract(shuffled, tmp_path / "c")
    assert _shards(tmp_path / "c") == expected


def test_partitions_only_cut_the_rows(extracted: tuple[Path, Path], tmp_path: Path) -> None:
    folder, out = extracted
    _extract(folder, tmp_path / "one", config=ExtractConfig(partitions=1))
    _extract(folder, tmp_path / "five", config=ExtractConfig(partitions=5))
    frames = [
        pl.read_parquet(place / "shards" / "*.parquet").sort("stay_id")
        for place in (out, tmp_path / "one", tmp_path / "five")
    ]
    assert frames[0].equals(frames[1])
    assert frames[0].equals(frames[2])


def test_a_staged_folder_keeps_its_partitions(extracted: tuple[Path, Path], tmp_path: Path) -> None:
    stage(extracted[0], tmp_path / "staged", partitions=2)
    with pytest.raises(InputError, match="staged in 2 partitions, but partitions=3"):
        _extract(tmp_path / "staged", tmp_path / "o", config=ExtractConfig(partitions=3))


def test_a_finished_output_is_used_again_or_refused(
    extracted: tuple[Path, Path], make_hospital: Callable[..., Path], tmp_path: Path
) -> None:
    folder, out = extracted
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert _extract(folder, out) == Manifest.load(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(InputError, match="another config"):
        _extract(folder, out, config=TWO.model_copy(update={"timestep_hours": 2.0}))
    with pytest.raises(InputError, match="another sources"):
        _extract(make_hospital(tmp_path / "other", seed=1), out)
    with pytest.raises(InputError, match="another task"):
        _extract(folder, out, task="phenotyping")


SCRIPT = """
import sys
from pathlib import Path
from data import pipeline
from data.switches import ExtractConfig, Sources
import ray
sys.path.insert(0, ".")
from ray_jobs import cluster
with cluster.connect(num_cpus=1):
    pipeline.extract(Sources(mimic_iv=Path(sys.argv[1])), "mortality",
                     ExtractConfig(partitions=6), Path(sys.argv[2]), preset="corrected")
"""


@pytest.mark.slow
def test_a_killed_extraction_continues_with_the_same_bytes(
    tmp_path: Path, make_hospital: Callable[..., Path], ray_session: None
) -> None:
    folder = make_hospital(tmp_path / "raw", patients=600)
    config = ExtractConfig(partitions=6)
    _extract(folder, tmp_path / "whole", config=config)
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "out")],
        cwd=Path(__file__).parents[3],
        start_new_session=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not (done := list(tmp_path.glob(".out.*/records/part-*.json"))):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "out").exists()
    time.sleep(2)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".out.*/shards/*")}
    _extract(folder, tmp_path / "out", config=config)
    assert _shards(tmp_path / "out") == _shards(tmp_path / "whole")
    later = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/shards").iterdir()}
    untouched = [path.name for path, stamp in kept.items() if later.get(path.name) == stamp]
    assert len(untouched) >= len(done)


def test_an_interrupted_extraction_continues_with_what_is_missing(
    extracted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = extracted

    def interrupted(job, partitions):
        pipeline.extract_one(1, job)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _extract(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (work,) = tmp_path.glob(".out.*.partial")
    assert work.stat().st_mode & 0o777 == 0o700
    shard = work / "shards" / "part-00001.parquet"
    stamp = shard.stat().st_mtime_ns
    _extract(folder, tmp_path / "out")
    assert _shards(tmp_path / "out") == _shards(out)
    assert (tmp_path / "out" / "shards" / shard.name).stat().st_mtime_ns == stamp


def test_a_shard_altered_while_unfinished_is_made_again(
    extracted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = extracted

    def altered(job, partitions):
        pipeline.extract_one(0, job)
        shard = job.work / "shards" / "part-00000.parquet"
        shard.write_bytes(shard.read_bytes()[:-1])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_run", altered)
        with pytest.raises(KeyboardInterrupt):
            _extract(folder, tmp_path / "out")
    _extract(folder, tmp_path / "out")
    assert _shards(tmp_path / "out") == _shards(out)


def test_the_real_demos_through_ray(tmp_path: Path, ray_session: None) -> None:
    for name, task in (("mimic_iv", "phenotyping_48h"), ("mimic_iii", "mortality")):
        folder = DEMO / name.replace("_", "-")
        out = tmp_path / name
        sources = Sources.model_validate({name: folder})
        manifest = pipeline.extract(sources, task, TWO, out, preset="corrected")
        assert check(out) == []
        assert 40 < manifest.rows < 140


def _spoil(tables: dict, table: str, column: str, value: str) -> None:
    tables[table][4][column] = value


FAULTS: dict[str, tuple[Callable[[dict], object], str]] = {
    "unparsable time": (
        functools.partial(_spoil, table="chartevents", column="charttime", value="soon"),
        r"chartevents\.csv\.gz: row 5: column charttime",
    ),
    "duplicate stay": (
        lambda tables: tables["icustays"].append({**tables["icustays"][0], "los": "9"}),
        r"icustays\.csv\.gz: rows 1, 13",
    ),
    "duplicate patient": (
        lambda tables: tables["patients"].append({**tables["patients"][0], "gender": "X"}),
        r"patients\.csv\.gz: rows 1, 13",
    ),
    "duplicate admission": (
        lambda tables: tables["admissions"].append(
            {**tables["admissions"][0], "dischtime": "2151-01-01 00:00:00"}
        ),
        r"admissions\.csv\.gz: rows 1, 13",
    ),
    "only transfers": (
        lambda tables: [row.update(last_careunit="SICU") for row in tables["icustays"]],
        "empty cohort: the rule 'no transfer between units' left none of 12 stays",
    ),
    "only minors": (
        lambda tables: [row.update(anchor_age="9") for row in tables["patients"]],
        "empty cohort: the rule 'adults' left none of 12 stays",
    ),
    "only short stays": (
        lambda tables: [row.update(los="1.0") for row in tables["icustays"]],
        "empty cohort: the rule 'long enough' left none",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_message_and_no_output(
    tmp_path: Path, make_hospital: Callable[..., Path], ray_session: None, fault: str
) -> None:
    edit, message = FAULTS[fault]
    folder = make_hospital(tmp_path / "raw", edit=edit)
    with pytest.raises(InputError, match=message):
        _extract(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    leftovers = list(tmp_path.glob(".out.*/**/*.partial"))
    assert leftovers == []


def test_a_fault_found_by_a_worker_reaches_the_user_as_it_is(
    extracted: tuple[Path, Path], tmp_path: Path
) -> None:
    stage(extracted[0], tmp_path / "staged", partitions=2)
    victim = next((tmp_path / "staged" / "tables" / "chartevents").glob("part-00001*"))
    victim.write_bytes(victim.read_bytes() + b"x")
    with pytest.raises(InputError, match=r"part-00001-00000\.parquet: altered or missing"):
        _extract(tmp_path / "staged", tmp_path / "out", config=ExtractConfig())
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_output_and_a_later_run_succeeds(
    extracted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = extracted

    def full(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(pl.DataFrame, "write_parquet", full)
        with pytest.raises(InputError, match="disk is full"):
            _extract(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.rglob("*.parquet*")) == []
    _extract(folder, tmp_path / "out")
    assert _shards(tmp_path / "out") == _shards(out)


def test_a_real_full_disk_is_named(tmp_path: Path, make_hospital: Callable[..., Path]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)]
    if (
        mount is None
        or subprocess.run([mount, *options], check=False, capture_output=True).returncode
    ):
        pytest.skip("mounting a tmpfs is not allowed here; the test of the write seam ran")
    try:
        folder = make_hospital(tmp_path / "raw", patients=60)
        with pytest.raises(InputError, match=r"disk is full.*the same command continues"):
            stage(folder, disk / "staged", partitions=40)
        assert not (disk / "staged").exists()
        assert [path for path in disk.rglob("*") if path.name.endswith(".parquet.partial")] == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_wrong_sources_are_refused(tmp_path: Path, ray_session: None) -> None:
    with pytest.raises(InputError, match="needs --mimic-iv or --mimic-iii"):
        pipeline.extract(Sources(), "mortality", TWO, tmp_path / "o", preset="corrected")
    with pytest.raises(InputError, match=r"holds mimic-iii-1\.4; give it as --mimic-iii"):
        _extract(DEMO / "mimic-iii", tmp_path / "o")
    with pytest.raises(InputError, match="made of images"):
        _extract(DEMO / "mimic-iv", tmp_path / "o", task="radiology")


def test_staged_tables_can_be_loaded_without_ray(
    extracted: tuple[Path, Path], tmp_path: Path
) -> None:
    staged = stage(extracted[0], tmp_path / "staged", partitions=1)
    assert load_tables(tmp_path / "staged", staged.files_of(0))["icustays"].height == 12
    assert json.loads((tmp_path / "staged" / "stage.json").read_text())["partitions"] == 1


STAMP = "%Y-%m-%d %H:%M:%S"


def _after_48_hours(tables: dict) -> None:
    """Change every source table in what was not known 48 hours after intime."""
    limit = {
        row["subject_id"]: datetime.strptime(row["intime"], STAMP) + timedelta(hours=48)  # noqa: DTZ007
        for row in tables["icustays"]
    }
    for table in ("chartevents", "labevents", "outputevents"):
        for row in list(tables[table]):
            stored = datetime.strptime(row["storetime"], STAMP)  # noqa: DTZ007
            if stored > limit[row["subject_id"]]:
                row |= {
                    "value": "55",
                    "valueuom": "",
                    **({"valuenum": "55"} if "valuenum" in row else {}),
                }
                tables[table].append({**row, "value": "66"})
        late = [row for row in tables[table] if row["subject_id"] == "10002"][:1]
        for row in late:
            tables[table].append({**row, "value": "77", "storetime": _moved(limit["10002"], 1)})
    for row in tables["icustays"]:
        row["outtime"] = _moved(datetime.strptime(row["outtime"], STAMP), 3600)  # noqa: DTZ007
    for row in tables["admissions"]:
        row["dischtime"] = _moved(datetime.strptime(row["dischtime"], STAMP), 86_400)  # noqa: DTZ007
        row["deathtime"] = "" if row["deathtime"] else row["dischtime"]
    for row in tables["patients"]:
        row["dod"] = "" if row["dod"] else "2152-01-01"
    for row in tables["diagnoses_icd"]:
        row["icd_code"] = "41401"


def _moved(time: datetime, seconds: int) -> str:
    return (time + timedelta(seconds=seconds)).strftime(STAMP)


def _just_before(tables: dict) -> None:
    row = next(row for row in tables["chartevents"] if row["itemid"] == "220045")
    row |= {"value": "199", "valuenum": "199"}


def test_nothing_after_the_prediction_time_reaches_a_feature(
    extracted: tuple[Path, Path], tmp_path: Path, make_hospital: Callable[..., Path]
) -> None:
    def features(out: Path) -> pl.DataFrame:
        frame = pl.read_parquet(out / "shards" / "*.parquet")
        return frame.drop("labels").sort("stay_id")

    expected = features(extracted[1])
    _extract(make_hospital(tmp_path / "after", edit=_after_48_hours), tmp_path / "a")
    assert features(tmp_path / "a").equals(expected)
    labels = pl.read_parquet(tmp_path / "a" / "shards" / "*.parquet")["labels"].list.first()
    assert labels.sum() == 9
    _extract(make_hospital(tmp_path / "before", edit=_just_before), tmp_path / "b")
    assert not features(tmp_path / "b").equals(expected)
