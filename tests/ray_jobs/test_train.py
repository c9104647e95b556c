"""One run on Ray Train: killed workers, Ctrl-C, a killed driver; and what a name may claim."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from data.errors import InputError
from data.manifest import Manifest
from fusion.training import metrics_log
from fusion.training.checkpoint import read_weights
from fusion.training.flight import SaveError, raise_alike
from fusion.training.strategy import Single
from ray_jobs import capacity, lineage, session, train
from ray_jobs import config as run_config
from ray_jobs.config import RunConfig, ScalingConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, rows=60, image_size=32, hours=48)
    return folder


@pytest.fixture
def make_config(shards, tmp_path):
    def make(name="one", **changes):
        value = {
            "name": name,
            "runs_dir": tmp_path / "runs",
            "task": "mortality",
            "model": {"name": "lstm", "hidden": 8, "dropout": 0.3},
            "data": {"shards": shards, "batches": {"image": {"resize": 32, "size": 32}}},
            "optim": {"lr": 1e-2},
            "train": {"epochs": 8, "batch_size": 5, "log_every_steps": 1},
            "checkpoint": {"every_steps": 3},
            "scaling": {"num_workers": 2},
        }
        for path, change in changes.items():
            block = value
            *parents, leaf = path.split("__")
            for parent in parents:
                block = block.setdefault(parent, {})
            block[leaf] = change
        return RunConfig.model_validate(value)

    return make


def _updates(folder):
    lines = list(metrics_log.follow_files(folder / "metrics"))
    return [line["step"] for line in lines if line["kind"] == "train"]


def _train_lines(folder):
    return [line for line in metrics_log.read(folder / "metrics") if line["kind"] == "train"]


def _when(folder, updates, act):
    """Run `act` on a thread once the run has logged that many updates."""

    def watch():
        while not (seen := _updates(folder)) or seen[-1] < updates:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()


def _kill_a_worker():
    """SIGKILL one training worker among this process's own descendants."""
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            return


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_killed_worker_changes_nothing_in_the_result(make_config):
    undisturbed = train.run(make_config("undisturbed"))
    config = make_config("killed")
    _when(config.folder, 11, _kill_a_worker)
    killed = train.run(config)
    attempts = sorted(path.name for path in (killed / "metrics").glob("attempt-*"))
    assert attempts == ["attempt-1", "attempt-2"], "the kill came in time"
    starts = [
        line["values"]["updates"]
        for line in metrics_log.follow_files(killed / "metrics")
        if line["values"].get("event") == "start"
    ]
    assert starts[0] == 0
    assert starts[1] >= 6, "the checkpoint of step 9 may have been on its way to the disk"
    (recovered,) = [
        line["values"]
        for line in metrics_log.read(killed / "metrics")
        if line["values"].get("event") == "recovered"
    ]
    assert re.fullmatch(r"the process of rank [01] died", recovered["cause"])
    assert recovered["attempt"] == 2
    assert starts[1] + recovered["replayed"] >= 11
    assert recovered["replayed"] <= 6, "an interval, and one that was being written"
    curves = [
        [
            line["values"]["loss"]
            for line in metrics_log.read(run / "metrics")
            if line["kind"] == "train"
        ]
        for run in (undisturbed, killed)
    ]
    assert curves[0] == curves[1]
    weights = [read_weights(run / "best")[0] for run in (undisturbed, killed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    outcomes = [json.loads((run / "outcome.json").read_text()) for run in (undisturbed, killed)]
    for outcome in outcomes:
        del outcome["time"]
    assert outcomes[0] == outcomes[1]
    assert not (killed / ".ray").exists()
    before = sorted((killed / "metrics").rglob("*.jsonl"))
    assert train.run(config) == killed, "finished: says so and does nothing"
    assert sorted((killed / "metrics").rglob("*.jsonl")) == before


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_later_run_never_runs_a_frozen_encoder_whose_outputs_are_kept(make_config, tmp_path):
    """Two workers, each counting the forward passes of its own encoder's first convolution."""
    image = {"resize": 32, "size": 32, "augment": False}
    tiny = {"name": "medfuse", "hidden": 4, "fusion_hidden": 4, "depth": 10, "base_width": 4}

    def counting(session):
        def count(module, inputs, output):
            with (session.folder / f"passes-{session.strategy.rank}").open("a") as handle:
                handle.write(f"{len(output)}\n")

        session.strategy.model.cxr_encoder.conv1.register_forward_hook(count)

    def run(name, **changes):
        config = make_config(
            name,
            model=tiny,
            train__epochs=2,
            train__cache_embeddings=True,
            optim__group_lr={"cxr_encoder": 0},
            data__batches={"image": image, "cache_dir": tmp_path / "cache"},
            **changes,
        )
        folder = train.run(config, observer=train.Observer(session=counting))
        passes = [int(line) for path in folder.glob("passes-*") for line in path.open()]
        return sum(passes), [line["values"]["loss"] for line in _train_lines(folder)]

    first = run("first")
    second = run("second", optim__weight_decay=1e-9)
    manifest = Manifest.load(make_config().data.shards)
    assert first[0] == sum(manifest.overlap[split]["cxr"] for split in ("train", "val"))
    assert second[0] == 0
    assert len(first[1]) > 10
    assert second[1] == pytest.approx(first[1], abs=1e-4)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_ray_workers_train_alike_under_zero(make_config):
    changes = {"model__dropout": 0.0, "train__epochs": 2}
    names = ("ddp", "zero2", "zero3")
    runs = [train.run(make_config(name, scaling__strategy=name, **changes)) for name in names]
    plain, *sharded = (
        [line["values"]["loss"] for line in lines if line["kind"] == "train"]
        for lines in (metrics_log.read(run / "metrics") for run in runs)
    )
    assert len(plain) > 10
    weights = [read_weights(run / "best")[0] for run in runs]
    for losses, found in zip(sharded, weights[1:], strict=True):
        assert losses == pytest.approx(plain, abs=1e-5)
        assert found.keys() == weights[0].keys()
        for name, value in weights[0].items():
            torch.testing.assert_close(found[name], value, atol=1e-4, rtol=0)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_ctrl_c_writes_a_checkpoint_and_the_same_call_goes_on(make_config):
    config = make_config("interrupted", train__epochs=40)
    _when(config.folder, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="same command"):
        train.run(config)
    taken = _updates(config.folder)
    folder = train.run(config)
    assert _updates(folder)[: len(taken) + 1] == [*taken, taken[-1] + 1], "the very next step"
    meta = json.loads((folder / "best" / "meta.json").read_text())
    assert meta["config"]["name"] == "interrupted"


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_cluster_is_continued_by_the_same_command(make_config, tmp_path):
    """The driver and every process of its Ray instance: SIGKILL by pid."""
    config = make_config("orphan")
    run_config.dump(config, tmp_path / "run.yaml")
    script = (
        "import sys; from pathlib import Path; from ray_jobs import cluster, config, train\n"
        "(run,) = config.load(Path(sys.argv[1]))\n"
        "with cluster.connect(num_cpus=2):\n    train.run(run)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = tmp_path / "stderr.txt"
    with said.open("w") as handle:
        driver = subprocess.Popen(command, env=environment, stderr=handle)
    deadline = time.monotonic() + 240
    while not (seen := _updates(config.folder)) or seen[-1] < 5:
        assert time.monotonic() < deadline
        assert driver.poll() is None, said.read_text()[-2000:]
        time.sleep(0.02)
    family = psutil.Process(driver.pid).children(recursive=True)
    for process in [driver, *family]:
        os.kill(process.pid, signal.SIGKILL)
    driver.wait()
    assert psutil.wait_procs(family, timeout=60)[1] == []
    assert not (config.folder / "outcome.json").exists()
    subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True)
    surviving = metrics_log.read(config.folder / "metrics")
    steps = [line["step"] for line in surviving if line["kind"] == "train"]
    assert steps == list(range(1, steps[-1] + 1)), "each step once in the surviving history"
    assert json.loads((config.folder / "outcome.json").read_text())["epoch"] == 8
    (recovered,) = [
        line["values"] for line in surviving if line["values"].get("event") == "recovered"
    ]
    assert recovered["cause"] == "the command was killed"
    assert recovered["replayed"] <= 6


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_more_workers_than_the_cluster_holds_are_refused():
    asked = r"asks for 64, each with 1 CPU.*room for 4 \(CPU: 64 asked for, 4 there, at most 4 on"
    with pytest.raises(InputError, match=asked):
        capacity.check(ScalingConfig(num_workers=64))
    with pytest.raises(InputError, match=r"room for 0 \(GPU: 1 asked for, 0 there"):
        capacity.check(ScalingConfig(use_gpu=True))
    capacity.check(ScalingConfig(num_workers=(2, 64)))


def test_a_session_reads_the_shards_as_the_config_says(make_config, tmp_path):
    """36 training rows in batches of 5: eight steps, or seven whole ones."""
    rows = {}
    for drop in (False, True):
        config = make_config(train__drop_last=drop, scaling={"strategy": "single"})
        opened = session.open_session(
            config, train.RunFolder(tmp_path / str(drop)), Single(), train.STOP
        )
        assert opened.train.steps_per_epoch == 8 - drop
        rows[drop] = [batch.rows.tolist() for batch in opened.train.epoch(1)]
        assert [batch.rows.tolist() for batch in opened.train.epoch(1, 3)] == rows[drop][3:]
        assert [len(batch) for batch in opened.val.epoch(0)] == [5, 5, 2], "validation never"
    assert [len(batch) for batch in rows[False]] == [5] * 7 + [1]
    assert rows[True] == rows[False][:7]
    with pytest.raises(InputError, match="leaves nothing of 36 train rows"):
        session.open_session(
            make_config(train__drop_last=True, train__batch_size=64),
            train.RunFolder(tmp_path / "none"),
            Single(),
            train.STOP,
        )


def test_a_name_belongs_to_one_config(make_config, shards):
    manifest = Manifest.load(shards)
    first = lineage.claim(make_config(), manifest, fork=False)
    assert first.name == "one"
    assert first.folder.stat().st_mode & 0o777 == 0o700
    wider = make_config(scaling__num_workers=1)
    assert lineage.claim(wider, manifest, fork=False).name == "one", "workers are free"
    other = make_config(optim__lr=0.5)
    with pytest.raises(InputError, match=r"optim\.lr: 0\.01 -> 0\.5(.|\n)*--fork"):
        lineage.claim(other, manifest, fork=False)
    assert lineage.claim(other, manifest, fork=True).name == "one-2"
    assert lineage.claim(other, manifest, fork=True).name == "one-2", "continues its own fork"
    third = make_config(optim__lr=0.25)
    assert lineage.claim(third, manifest, fork=True).name == "one-3"


def test_a_checkpoint_that_a_full_disk_refuses_is_told_as_one():
    """By the number of the system's error, or by the text of safetensors' own."""
    for error in (
        OSError(errno.ENOSPC, "No space left on device", "/disk/part"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ):
        with pytest.raises(SaveError) as caught:
            raise_alike(Single(), "checkpoint step-00000004", error)
        place = "/disk/part" if isinstance(error, OSError) else "/run"
        said = f"{place}: cannot be written (No space left on device); free space there"
        assert train.full_disk(caught.value, "/run") == said
    with pytest.raises(SaveError) as caught:
        raise_alike(Single(), "checkpoint step-00000004", RuntimeError("the bucket is gone"))
    assert train.full_disk(caught.value, "/run") is None


def test_other_shards_under_the_same_name_are_refused(make_config, make_shards, shards, tmp_path):
    lineage.claim(make_config(), Manifest.load(shards), fork=False)
    moved = make_shards(tmp_path / "moved", rows=60, image_size=32, seed=9)
    with pytest.raises(InputError, match="shards: manifest"):
        lineage.claim(make_config(data__shards=tmp_path / "moved"), moved, fork=False)


def test_shards_of_another_task_or_preset_are_refused(make_config, shards):
    manifest = Manifest.load(shards)
    with pytest.raises(InputError, match="holds the task 'mortality'"):
        lineage.check_shards(make_config(task="phenotyping"), manifest)
    with pytest.raises(InputError, match=r"data\.allow_mixed"):
        lineage.check_shards(make_config(preset="code"), manifest)
    lineage.check_shards(make_config(preset="code", data__allow_mixed=True), manifest)


def test_shards_without_a_class_to_choose_by_are_refused(make_config, make_shards, tmp_path):
    def one_class(rows):
        for row in rows:
            if row["split"] == "val":
                row["labels"] = [0.0]

    make_shards(tmp_path / "shards", rows=60, image_size=32, edit=one_class)
    config = make_config(data__shards=tmp_path / "shards")
    with pytest.raises(InputError, match="split val: every label has one class only"):
        train.run(config)
    assert not config.folder.exists()


def test_a_run_in_training_refuses_a_second_process(make_config, shards):
    config = make_config()
    lineage.claim(config, Manifest.load(shards), fork=False)
    folder = train.RunFolder(config.folder)
    again = pytest.raises(InputError, match="another process")
    with lineage.locked(folder), again, lineage.locked(folder):
        pass
    with lineage.locked(folder):
        pass


def test_the_environment_names_no_host_user_or_path(make_config, shards):
    lineage.claim(make_config(), Manifest.load(shards), fork=False)
    text = (make_config().folder / "env.json").read_text()
    for secret in (os.uname().nodename, str(Path.home()), str(ROOT), str(shards)):
        assert f'"{secret}' not in text
    starts = json.loads(text)["starts"]
    assert starts[0]["packages"]["torch"]
