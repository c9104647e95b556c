"""A run that lives in a bucket goes on anywhere, whatever cut its uploads short."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

from data.errors import InputError
from fusion.training import checkpoint, loop, metrics_log
from fusion.training.strategy import Single
from ray_jobs import config as run_config
from ray_jobs import mirror, session, storage
from ray_jobs.cli import app
from ray_jobs.config import RunConfig
from ray_jobs.mirror import Mirror
from ray_jobs.runs import RunFolder

ROOT = Path(__file__).parents[3]
STOP = ".stop"


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, rows=40, image_size=32, hours=48)
    return folder


@pytest.fixture
def make_config(shards, tmp_path):
    def make(home, storage_path=None):
        return RunConfig.model_validate(
            {
                "name": "one",
                "runs_dir": tmp_path / home,
                "storage_path": storage_path,
                "task": "mortality",
                "model": {"name": "lstm", "hidden": 8, "dropout": 0.3},
                "data": {
                    "shards": shards,
                    "batches": {
                        "image": {"resize": 32, "size": 32},
                        "cache_dir": tmp_path / "cache",
                    },
                },
                "optim": {"lr": 1e-2},
                "train": {"epochs": 3, "batch_size": 5, "log_every_steps": 1},
                "checkpoint": {"every_steps": 2},
                "scaling": {"strategy": "single"},
            }
        )

    return make


def train(config, stop_at=None):
    """One worker's part of `rayfuse train`, without Ray; how it ended."""
    torch.set_num_threads(1)
    folder = RunFolder(config.folder)
    folder.path.mkdir(parents=True, exist_ok=True)
    with mirror.kept(config, folder) as copy:
        run_config.dump(config, folder.config)
        made = session.open_session(config, folder, Single(torch.device("cpu")), STOP)
        made.stop_requested = lambda: made.progress.updates == stop_at
        ending = loop.fit(made)
        made.log.close()
        if copy is not None:
            copy.push()
    return ending


def curve(config):
    """Every training loss of the history that survives, by step."""
    lines = metrics_log.read(config.folder / "metrics")
    return {line["step"]: line["values"]["loss"] for line in lines if line["kind"] == "train"}


def weights(config):
    return checkpoint.read_weights(config.folder / "best")[0]


def whole(store, folder):
    """Literally: the newest checkpoint whose files are all there with their hashes, by step."""
    steps = {}
    for name, data in store.objects.items():
        if name.startswith("checkpoints/"):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            steps[int(name.split("/")[1].removeprefix("step-"))] = target.relative_to(folder)
    good = [
        step
        for step in steps
        if checkpoint.verify(folder / "checkpoints" / f"step-{step:08d}") is None
    ]
    newest = max(good, default=None)
    return newest, [step for step in steps if newest is None or step > newest]


def test_a_run_goes_on_from_its_bucket_as_if_nothing_had_happened(make_config, s3):
    undisturbed = make_config("undisturbed")
    assert train(undisturbed) == "epochs"
    first = make_config("first", s3("lives"))
    assert train(first, stop_at=7) == "interrupted"
    seen = curve(first)
    shutil.rmtree(first.folder)
    elsewhere = first.model_copy(update={"runs_dir": make_config("second").runs_dir})
    assert train(elsewhere) == "epochs"
    assert curve(elsewhere) == curve(undisturbed), "bit-equal, the first start's part included"
    assert max(seen) == 7
    attempts = sorted(path.name for path in (elsewhere.folder / "metrics").glob("attempt-*"))
    assert attempts == ["attempt-1", "attempt-2"]
    for name, value in weights(undisturbed).items():
        assert torch.equal(weights(elsewhere)[name], value)
    # A reader with nothing but the bucket gets the same run.
    pulled = make_config("third")
    place, query = first.storage_path.split("?")
    command = ["runs", "pull", f"{place}/one?{query}", "--out", str(pulled.runs_dir)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert curve(pulled) == curve(undisturbed)
    assert all(
        torch.equal(weights(pulled)[name], weights(elsewhere)[name]) for name in weights(pulled)
    )
    kept = {
        home: sorted(path.name for path in (config.folder / "checkpoints").iterdir())
        for home, config in (("there", elsewhere), ("pulled", pulled))
    }
    assert len(kept["there"]) == 2
    assert kept["pulled"] == kept["there"][-1:], "only the newest is fetched"


@pytest.fixture
def recorded(make_config, tmp_path, memory, monkeypatch):
    """All that a run of some steps did to its bucket, call by call."""
    config = make_config("recorded")
    monkeypatch.setattr(mirror, "of", lambda config, folder: Mirror(memory, folder))
    monkeypatch.setattr(mirror.lease, "RENEW_S", 1e6)
    train(config, stop_at=7)
    return config, memory


def test_an_upload_cut_anywhere_leaves_the_newest_whole_checkpoint(recorded, tmp_path):
    _, store = recorded
    calls = len(store.log)
    seen = set()
    for count in range(calls + 1):
        past = store.after(count)
        expected, passed_over = whole(past, tmp_path / f"literal-{count}")
        pulled = Mirror(past, tmp_path / f"pulled-{count}").pull()
        assert pulled.step == expected
        assert {int(name.removeprefix("step-")) for name in pulled.skipped} == set(passed_over)
        if expected is not None:
            found = checkpoint.newest_complete(tmp_path / f"pulled-{count}" / "checkpoints")
            assert found.path.name == f"step-{expected:08d}"
            lines = metrics_log.read(tmp_path / f"pulled-{count}" / "metrics")
            steps = [line["step"] for line in lines if line["kind"] == "train"]
            assert steps[:expected] == list(range(1, expected + 1)), "with all that led to it"
        elif seen - {None}:
            raise AssertionError("a bucket that had a whole checkpoint has one ever after")
        seen.add(expected)
    assert seen == {None, 2, 4, 5, 6, 7}


def test_an_altered_object_is_passed_over(recorded, tmp_path):
    _, store = recorded
    newest = max(name for name in store.objects if name.endswith("weights.safetensors"))
    data = store.objects[newest]
    store.objects[newest] = data[:-1] + bytes([data[-1] ^ 1])
    pulled = Mirror(store, tmp_path / "pulled").pull()
    (name, why), *_ = pulled.skipped.items()
    assert name == newest.split("/")[1]
    assert "was altered" in why
    assert pulled.step == 6


def test_what_a_lost_connection_kept_back_is_put_at_the_next_start(recorded, tmp_path):
    config, store = recorded
    behind = store.after(len(store.log) // 2)
    (config.folder / "outcome.json").write_text("{}")
    Mirror(behind, config.folder).push()
    assert Mirror(behind, tmp_path / "pulled").pull().step == 7
    fetched = {path.relative_to(tmp_path / "pulled") for path in (tmp_path / "pulled").rglob("*")}
    ours = {path.relative_to(config.folder) for path in config.folder.rglob("*")}
    older = {path for path in ours if "step-00000006" in path.parts}
    assert ours - fetched == older
    assert fetched <= ours
    kept = {name.split("/")[1] for name in behind.names("checkpoints/")}
    assert kept <= {"step-00000006", "step-00000007"}, "nothing is left that the folder removed"


def test_nothing_is_put_twice(recorded):
    config, store = recorded
    Mirror(store, config.folder).push()
    before = len(store.log)
    Mirror(store, config.folder).push()
    assert {name for _, name, *_ in store.log[before:]} <= {"config.yaml", "env.json"}


def test_a_folder_behind_its_bucket_takes_the_buckets_history(recorded, tmp_path):
    """Start 1 here, start 2 elsewhere, start 3 here: attempt 2 of both would clash."""
    _, store = recorded
    folder = tmp_path / "behind"
    Mirror(store.after(len(store.log) // 2), folder).pull()
    stale = folder / "metrics" / "attempt-2" / "part-00001.jsonl"
    stale.parent.mkdir()
    stale.write_text("{}\n")
    assert Mirror(store, folder).pull().step == 7
    assert not stale.exists()


def test_a_bucket_that_fails_stops_the_run_and_the_same_command_goes_on(
    make_config, memory, monkeypatch
):
    undisturbed = make_config("undisturbed")
    train(undisturbed)
    monkeypatch.setattr(mirror, "of", lambda config, folder: Mirror(memory, folder))
    monkeypatch.setattr(mirror.lease, "RENEW_S", 1e6)
    config = make_config("fails")
    memory.puts = 20
    with pytest.raises(InputError, match="storage_path: the network is gone"):
        train(config)
    stopped = checkpoint.newest_complete(config.folder / "checkpoints").path.name
    assert "step-00000000" < stopped < f"step-{max(curve(undisturbed)):08d}"
    memory.puts = None
    assert train(config) == "epochs"
    assert curve(config) == curve(undisturbed)
    assert Mirror(memory, make_config("pulled").folder).pull().step == max(curve(undisturbed))


def test_a_name_in_the_bucket_belongs_to_its_config(make_config, s3):
    from data.manifest import Manifest
    from ray_jobs import lineage

    config = make_config("here", s3("claimed"))
    manifest = Manifest.load(config.data.shards)
    lineage.claim(config, manifest, fork=False)
    Mirror(storage.open_store(config.storage_path, "one"), config.folder).push()
    shutil.rmtree(config.folder)
    other = config.model_copy(update={"seed": 5})
    with pytest.raises(InputError, match="run of another config:\n  seed: 0 -> 5"):
        lineage.claim(other, manifest, fork=False)
    assert lineage.claim(other, manifest, fork=True).name == "one-2"
    assert lineage.claim(config, manifest, fork=False).name == "one"


def test_a_bucket_is_checked_before_anything_starts(make_config, s3):
    from ray_jobs import train as job

    config = make_config("unmade", s3("not-made", make=False))
    with pytest.raises(InputError, match="bucket 'not-made' does not exist"):
        job.run(config)
    assert not config.runs_dir.exists()


def test_a_run_that_another_machine_trains_is_refused(make_config, memory, monkeypatch, tmp_path):
    monkeypatch.setattr(mirror, "of", lambda config, folder: Mirror(memory, folder))
    monkeypatch.setattr(mirror.lease, "RENEW_S", 0.05)
    (tmp_path / "there").mkdir()
    with (
        mirror.lease.held(memory, tmp_path / "there"),
        pytest.raises(InputError, match="being trained by another command"),
    ):
        train(make_config("here"))
    assert set(memory.objects) == set(), "nothing was put"


def test_a_place_without_a_run_is_refused(s3, tmp_path):
    path = s3("empty")
    with pytest.raises(InputError, match=r"s3://empty/runs: no run there"):
        mirror.fetch(path, tmp_path)
    with pytest.raises(InputError, match="name a run in a bucket"):
        mirror.fetch("runs/one", tmp_path)


SCRIPT = """
import sys
from pathlib import Path
from ray_jobs import cluster, config, lease, train
lease.RENEW_S, lease.DEAD_AFTER_S = 0.5, 5.0
with cluster.connect(num_cpus=3):
    for name in sys.argv[1:]:
        (run,) = config.load(Path(name))
        train.run(run)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_machine_that_is_gone_is_replaced(make_config, s3, tmp_path):
    """Two workers; driver and Ray are killed, their disk is lost: another machine goes on."""
    wide = {"scaling": {"num_workers": 2, "strategy": "ddp"}, "train": {"epochs": 5}}
    wide["train"] |= {"batch_size": 5, "log_every_steps": 1}
    files = []
    for home, place in (
        ("first", s3("machine")),
        ("second", s3("machine", make=False)),
        ("plain", None),
    ):
        document = make_config(home, place).model_dump(mode="json") | wide
        config = RunConfig.model_validate(document)
        files.append((config, tmp_path / f"{home}.yaml"))
        run_config.dump(*files[-1])
    (first, killed), (second, going_on), (plain, undisturbed) = files
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = tmp_path / "stderr.txt"
    with said.open("w") as handle:
        driver = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(killed)], env=environment, stderr=handle
        )
    store = storage.open_store(first.storage_path, "one")
    deadline = time.monotonic() + 900
    while not any(name.endswith("COMPLETE") for name in store.names("checkpoints/")):
        assert time.monotonic() < deadline
        assert driver.poll() is None, said.read_text()[-2000:]
        time.sleep(0.05)
    family = psutil.Process(driver.pid).children(recursive=True)
    for process in [driver, *family]:
        os.kill(process.pid, signal.SIGKILL)
    driver.wait()
    assert psutil.wait_procs(family, timeout=60)[1] == []
    shutil.rmtree(first.folder)
    assert "outcome.json" not in store.names()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(going_on), str(undisturbed)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert curve(second) == curve(plain)
    lines = list(metrics_log.follow_files(second.folder / "metrics"))
    starts = [one["values"]["updates"] for one in lines if one["values"].get("event") == "start"]
    assert starts[0] == 0
    assert len(starts) == 2
    assert starts[1] > 0, "it did not begin anew"
    assert {"outcome.json", "config.yaml", "env.json"} <= set(store.names())
    assert "lease.json" not in store.names()
