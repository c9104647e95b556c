"""Searches on Ray Tune and Ray Train: trials at once, killed workers, a killed driver, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from optuna.trial import TrialState

from data.errors import InputError
from fusion.training import metrics_log
from ray_jobs import config as run_config
from ray_jobs import tune
from ray_jobs.search import space
from ray_jobs.search.study import Study

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, rows=60, image_size=32, hours=24)
    return folder


@pytest.fixture
def make_plan(shards, tmp_path):
    """`make_plan(epochs, **search keys)`: run.yaml and search.yaml in tmp_path, and their plan."""

    def make(epochs: int, workers: int = 1, **search) -> tune.Plan:
        run = {
            "name": "one",
            "runs_dir": str(tmp_path / "runs"),
            "task": "mortality",
            "model": {"name": "lstm", "hidden": 4},
            "data": {"shards": str(shards)},
            "optim": {"lr": 1e-2},
            "train": {"epochs": epochs, "batch_size": 6, "log_every_steps": 1, "patience": 1000},
            "scaling": {"num_workers": workers},
        }
        document = {"space": {"optim.lr": {"log": [1e-3, 1e-1]}}, **search}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
        (tmp_path / "search.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
        (loaded,) = run_config.load(tmp_path / "run.yaml")
        found = space.load(tmp_path / "search.yaml", loaded)
        return tune.Plan("one-search", loaded, found, confirm=False)

    return make


def study_of(plan):
    return Study(plan.search, plan.run, plan.folder.path)


def lines_of(plan, name, kind="train"):
    found = metrics_log.follow_files(plan.folder.path / name / "metrics")
    return [line for line in found if line["kind"] == kind]


def starts(plan, name):
    events = lines_of(plan, name, "event")
    return [line["step"] for line in events if line["values"]["event"] == "start"]


def spans(plan, name):
    """When a trial's run was begun, and its last step."""
    known = json.loads((plan.folder.path / name / "env.json").read_text())
    return known["starts"][0]["time"], lines_of(plan, name)[-1]["time"]


def wait_for(condition, process=None, log=None, seconds=900):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:] if log else "too slow"
        time.sleep(0.05)


def whole_and_once(plan, name):
    """The surviving history of a trial has each step once."""
    history = metrics_log.read(plan.folder.path / name / "metrics")
    steps = [line["step"] for line in history if line["kind"] == "train"]
    return steps == list(range(1, steps[-1] + 1))


@pytest.mark.usefixtures("ray_session")
def test_two_trials_at_once_share_the_cluster_and_one_is_pruned(make_plan):
    """Four CPUs, two workers a trial: the third waits, and says so."""
    points = [{"optim.lr": 0.05}, {"optim.lr": 0.001}, {"optim.lr": 0.0011}]
    said: list[str] = []
    with pytest.raises(InputError, match=r"asks for 64, each with 1 CPU"):
        tune.run(make_plan(2, workers=64), say=said.append)
    pruner = {"name": "median", "min_epochs": 1, "startup_trials": 1}
    plan = make_plan(8, workers=2, trials=3, points=points, metrics={"loss": "min"}, pruner=pruner)
    folder = tune.run(plan, say=said.append)
    trials = study_of(plan).trials
    assert len(trials) == 3
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    first, second = (spans(plan, f"trial-000{number}") for number in (0, 1))
    assert max(first[0], second[0]) < min(first[1], second[1]), "two at once"
    assert all("2 worker(s), each with 1 CPU" in line for line in said if "waits" in line)
    for trial in trials:
        outcome = folder / f"trial-{trial.number:04d}" / "outcome.json"
        assert outcome.is_file() == (trial.state == TrialState.COMPLETE)
        assert starts(plan, f"trial-{trial.number:04d}") == [0]
    assert not (folder / ".tune").exists()


def _kill_one(named):
    """SIGKILL one among this process's descendants by its id; whether there was one."""
    for process in psutil.Process().children(recursive=True):
        if named in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            return True
    return False


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_killed_workers_and_trial_processes_cost_no_trial(make_plan):
    plan = make_plan(30, trials=2, metrics={"loss": "min"})
    killed: list[str] = []

    def disturb():
        wait_for(lambda: any(lines_of(plan, f"trial-000{n}") for n in range(2)))
        if _kill_one("RayTrainWorker"):
            killed.append("worker")
        before = len(starts(plan, "trial-0000") + starts(plan, "trial-0001"))
        wait_for(
            lambda: (
                len(starts(plan, "trial-0000") + starts(plan, "trial-0001")) > before
                or all((plan.folder.path / f"trial-000{n}/outcome.json").exists() for n in range(2))
            )
        )
        if _kill_one("ray::ImplicitFunc"):
            killed.append("trial")

    thread = threading.Thread(target=disturb, daemon=True)
    thread.start()
    tune.run(plan)
    assert killed == ["worker", "trial"]
    assert [trial.state for trial in study_of(plan).trials] == [TrialState.COMPLETE] * 2
    for name in ("trial-0000", "trial-0001"):
        assert whole_and_once(plan, name)
        outcome = json.loads((plan.folder.path / name / "outcome.json").read_text())
        assert outcome["epoch"] == 30


SCRIPT = (
    "import sys; from pathlib import Path; from ray_jobs import cluster, config, tune\n"
    "from ray_jobs.search import space\n"
    "(run,) = config.load(Path('run.yaml')); search = space.load(Path('search.yaml'), run)\n"
    "plan = tune.Plan('one-search', run, search, confirm=False)\n"
    "say = lambda line: print(line, file=sys.stderr, flush=True)\n"
    "with cluster.connect(num_cpus=2):\n    tune.run(plan, say=say)\n"
)


@pytest.fixture
def start(tmp_path):
    """`start()`: the search as a process of its own, with its log."""

    def begin():
        log = tmp_path / "log.txt"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-c", SCRIPT]
        with log.open("a") as handle:
            process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=handle)
        return process, log

    return begin


def _end(process):
    """What is left of a process and its descendants: SIGKILL by their ids."""
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        for each in [psutil.Process(process.pid), *family]:
            os.kill(each.pid, signal.SIGKILL)
        psutil.wait_procs(family, timeout=60)
        process.wait()


@pytest.mark.slow
def test_a_killed_driver_and_ctrl_c_lose_nothing_and_run_nothing_twice(make_plan, start):
    plan = make_plan(12, trials=3, metrics={"loss": "min"})
    running = [f"trial-000{number}" for number in range(2)]
    process, log = start()
    try:
        wait_for(lambda: all(len(lines_of(plan, n)) > 15 for n in running[:1]), process, log)
        _end(process)

        process, log = start()
        wait_for(lambda: len(starts(plan, "trial-0000")) > 1, process, log)
        wait_for(lambda: len(lines_of(plan, "trial-0001")) > 15, process, log)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=900) != 0
        said = log.read_text()
        assert "Ctrl-C: running trials finish their step and write a checkpoint" in said
        first = {name: starts(plan, name) for name in running}
        done = [trial for trial in study_of(plan).trials if trial.state == TrialState.COMPLETE]

        process, log = start()
        assert process.wait(timeout=1800) == 0, log.read_text()[-3000:]
    finally:
        _end(process)
    trials = study_of(plan).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    for trial in done:
        name = f"trial-{trial.number:04d}"
        assert starts(plan, name) == first[name], "finished trials are not run again"
    # The second may have been killed before its first checkpoint.
    again = starts(plan, "trial-0000")[1:]
    assert again
    assert all(step > 0 for step in again), "went on from a checkpoint"
    for name in running:
        assert whole_and_once(plan, name)
    assert len(starts(plan, "trial-0002")) >= 1


def _kill_a_node_that_trains(head):
    """SIGKILL the processes, by their ids, of a node beside the head; whether one trains."""
    for node in head.nodes:
        family = psutil.Process(node.pid).children(recursive=True)
        if any("RayTrainWorker" in " ".join(process.cmdline()) for process in family):
            for process in [psutil.Process(node.pid), *family]:
                process.kill()
            return True
    return False


@pytest.mark.slow
def test_a_lost_node_costs_no_trial(make_plan, start_head, tmp_path):
    plan = make_plan(20, trials=3, metrics={"loss": "min"})
    names = [f"trial-000{number}" for number in range(3)]
    with start_head(num_cpus=1) as head:
        head.add_node()
        words = ["tune", str(tmp_path / "run.yaml"), str(tmp_path / "search.yaml")]
        options = ["--name", "one-search", "--no-confirm", "--address", head.gcs]
        log = tmp_path / "log.txt"
        with log.open("w") as handle:
            process = head.started(*words, *options, out=handle)
        try:
            wait_for(lambda: all(lines_of(plan, name) for name in names[:2]), process, log)
            assert _kill_a_node_that_trains(head)
            assert process.wait(timeout=600) == 0, log.read_text()[-3000:]
        finally:
            _end(process)
    assert [trial.state for trial in study_of(plan).trials] == [TrialState.COMPLETE] * 3
    # The node held the worker of one trial; it may have held another one's own process.
    assert sum(len(starts(plan, name)) for name in names) in (4, 5)
    for name in names:
        assert whole_and_once(plan, name)
        outcome = json.loads((plan.folder.path / name / "outcome.json").read_text())
        assert outcome["epoch"] == 20
