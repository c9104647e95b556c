"""A whole search, trained in this process: what is tried, remembered, pruned, stopped, refused."""

from __future__ import annotations

import datetime
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from optuna.trial import TrialState
from torch.nn.modules.module import register_module_forward_hook

from data.errors import InputError
from fusion.training import metrics_log
from fusion.training.checkpoint import read_weights
from ray_jobs import lineage, tune
from ray_jobs.runs import RunFolder
from ray_jobs.search import budget, cost
from ray_jobs.search.budget import Budget
from ray_jobs.search.study import Study
from ray_jobs.supervise import Terminated

SPACE = {"optim.lr": {"log": [1e-3, 1e-1]}, "model.dropout": {"uniform": [0.0, 0.5]}}


class DriverDiedError(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def study_of(plan):
    return Study(plan.search, plan.run, plan.folder.path)


def starts(folder):
    """The step at which each attempt of a run began."""
    lines = metrics_log.follow_files(folder / "metrics")
    return [line["step"] for line in lines if line["values"].get("event") == "start"]


def outcomes(plan):
    return [(trial.params, trial.values) for trial in study_of(plan).trials]


@pytest.fixture
def said():
    return []


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing takes longer than these searches; test_report has it."""
    monkeypatch.setattr(tune.report, "write", lambda study, run, folder: folder.report)


def test_every_trial_is_an_ordinary_run_scored_by_the_weights_it_keeps(make_plan, serial, said):
    point = {"optim.lr": 0.02, "model.dropout": 0.25}
    plan = make_plan({"space": SPACE, "trials": 3, "points": [point]})
    folder = tune.run(plan, say=said.append, executor=serial(plan))
    trials = study_of(plan).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    assert trials[0].params == point
    for trial in trials:
        run = RunFolder(folder / f"trial-{trial.number:04d}")
        history = metrics_log.read(run.metrics)
        scores = [line["values"]["auroc"] for line in history if line["kind"] == "val"]
        assert trial.values == [max(scores)]
        assert trial.intermediate_values == dict(enumerate(scores, 1))
        assert run.outcome.is_file()
        assert read_weights(run.best)[0]
    assert folder.stat().st_mode & 0o777 == 0o700
    best = max(trials, key=lambda trial: trial.value)
    assert any(f"best: trial-{best.number:04d}" in line or "best so far" in line for line in said)

    before = sorted(folder.rglob("*.jsonl"))
    tune.run(plan, say=said.append, executor=serial(plan))
    assert sorted(folder.rglob("*.jsonl")) == before, "finished: nothing is trained again"
    assert said[-2] == "search: 0 of 3 trial(s) to go"


def test_a_dead_driver_changes_nothing_in_the_result(make_plan, serial, said):
    whole = make_plan({"space": SPACE, "trials": 4}, name="whole")
    tune.run(whole, say=said.append, executor=serial(whole))
    plan = make_plan({"space": SPACE, "trials": 4}, name="parts")

    def die(number, epoch):
        def told(job, kind, value):
            if job.number == number and kind == "epoch" and value["epoch"] == epoch:
                raise DriverDiedError

        return told

    for number, epoch in ((1, 2), (3, 3)):
        with pytest.raises(DriverDiedError):
            tune.run(plan, say=said.append, executor=serial(plan, die(number, epoch)))
    tune.run(plan, say=said.append, executor=serial(plan))
    assert outcomes(plan) == outcomes(whole)
    found = {run.name: starts(run) for run in plan.folder.runs()}
    per_epoch = 3
    # Killed before the second epoch's checkpoint, and between the last one and its end.
    assert found == {
        "trial-0000": [0],
        "trial-0001": [0, per_epoch],
        "trial-0002": [0],
        "trial-0003": [0, 2 * per_epoch],
    }


def test_a_trial_that_ended_unheard_is_not_run_again(make_plan, serial, said):
    plan = make_plan({"space": SPACE, "trials": 1})
    executor = serial(plan)
    body = executor._body

    def die(job, tell):
        body(job, tell)
        raise DriverDiedError

    executor._body = die
    with pytest.raises(DriverDiedError):
        tune.run(plan, say=said.append, executor=executor)
    assert study_of(plan).unfinished == 1
    tune.run(plan, say=said.append, executor=serial(plan))
    assert study_of(plan).unfinished == 0
    assert starts(plan.folder.path / "trial-0000") == [0]


def test_a_second_trial_reads_the_frozen_encoders_outputs_of_the_first(
    make_plan, serial, said, search_shards, tmp_path
):
    """Counted where they happen: each forward pass of a convolution in this process."""
    batches = {
        "image": {"resize": 32, "size": 32, "augment": False},
        "cache_dir": tmp_path / "cache",
    }
    blocks = {
        "data": {"shards": search_shards, "batches": batches},
        "model": {"name": "medfuse", "hidden": 4, "fusion_hidden": 4, "depth": 10, "base_width": 4},
        "optim": {"lr": 1e-2, "group_lr": {"cxr_encoder": 0}},
    }
    passes = {}

    def search(name, **changes):
        plan = make_plan(
            {"space": SPACE, "trials": 2},
            name=name,
            **blocks,
            train={"epochs": 2, "batch_size": 12, "log_every_steps": 1, **changes},
        )

        def told(job, kind, value):
            passes[name, job.number] = passes.get((name, job.number), 0) + counted.pop_all()

        tune.run(plan, say=said.append, executor=serial(plan, told))
        return plan

    with Convolutions() as counted:
        plain = search("plain")
        cached = search("cached", cache_embeddings=True)
    assert passes["plain", 0] == passes["plain", 1] > 0
    assert passes["cached", 0] > 0
    assert passes["cached", 1] == 0
    for number in range(2):
        losses = [train_losses(plan, number) for plan in (plain, cached)]
        assert len(losses[0]) == 6
        np.testing.assert_allclose(losses[1], losses[0], atol=1e-6, rtol=0)


class Convolutions:
    """Counts forward passes of convolutions of any module in this process."""

    def __enter__(self):
        self._passes = 0
        self._handle = register_module_forward_hook(self._count)
        return self

    def __exit__(self, *error):
        self._handle.remove()

    def _count(self, module, inputs, output):
        self._passes += isinstance(module, torch.nn.Conv2d)

    def pop_all(self):
        """The passes since the last call."""
        passes, self._passes = self._passes, 0
        return passes


def train_losses(plan, number):
    lines = metrics_log.read(plan.folder.path / f"trial-{number:04d}" / "metrics")
    return [line["values"]["loss"] for line in lines if line["kind"] == "train"]


def test_pruned_trials_end_early_with_a_checkpoint(make_plan, serial, said):
    search = {
        "space": {"optim.lr": {"grid": [0.03, 1e-9, 1e-8, 1e-7]}},
        "sampler": "grid",
        "pruner": {"name": "median", "min_epochs": 2, "startup_trials": 1},
        "metrics": {"loss": "min"},
    }
    plan = make_plan(search, train={"epochs": 6, "batch_size": 12})
    folder = tune.run(plan, say=said.append, executor=serial(plan))
    trials = study_of(plan).trials
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    assert pruned
    assert any(trial.state == TrialState.COMPLETE for trial in trials)
    for trial in pruned:
        run = RunFolder(folder / f"trial-{trial.number:04d}")
        epochs = max(trial.intermediate_values)
        assert 2 <= epochs < 6
        assert list(run.checkpoints.glob("step-*/COMPLETE"))
        assert not run.outcome.exists()
    attempts = [starts(folder / f"trial-{trial.number:04d}") for trial in pruned]
    tune.run(plan, say=said.append, executor=serial(plan))
    assert [starts(folder / f"trial-{trial.number:04d}") for trial in pruned] == attempts


def test_scores_and_calibration_can_be_searched_together(make_plan, serial, said):
    plan = make_plan(
        {"space": SPACE, "trials": 3, "metrics": {"auprc": "max", "ece": "min"}},
    )
    tune.run(plan, say=said.append, executor=serial(plan))
    front = study_of(plan).best(3)
    assert front
    assert all(len(trial.values) == 2 for trial in front)


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (signal.SIGINT, KeyboardInterrupt),
        pytest.param(signal.SIGTERM, Terminated, marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_leaves_checkpoints_and_the_same_command_goes_on(
    make_plan, serial, said, number, error
):
    plan = make_plan({"space": SPACE, "trials": 2}, train={"epochs": 12, "batch_size": 12})

    def press(job, kind, value):
        if kind == "epoch" and value["epoch"] == 2 and job.number == 1:
            os.kill(os.getpid(), number)
            ask = plan.folder.asks / job.name
            while not ask.exists():
                signal.sigtimedwait([], 0.05)

    with pytest.raises(error, match="the same command goes on"):
        tune.run(plan, say=said.append, executor=serial(plan, press))
    trials = study_of(plan).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE, TrialState.RUNNING]
    first = plan.folder.path / "trial-0000"
    reached = [
        line["step"]
        for line in metrics_log.follow_files(plan.folder.path / "trial-0001" / "metrics")
    ][-1]
    tune.run(plan, say=said.append, executor=serial(plan))
    assert starts(first) == [0]
    assert starts(plan.folder.path / "trial-0001") == [0, reached]
    assert study_of(plan).unfinished == 0


def test_the_budget_ends_a_search_in_time_and_another_goes_on(make_plan, serial, said):
    plan = make_plan({"space": SPACE, "trials": 3}, train={"epochs": 6, "batch_size": 12})
    now = [0.0]

    def tick(job, kind, value):
        if kind == "epoch":
            now[0] += 10.0
        ask = plan.folder.asks / job.name
        while now[0] >= 90.0 and not ask.exists():
            signal.sigtimedwait([], 0.05)

    limited = Budget(seconds=100.0, clock=lambda: now[0])
    tune.run(plan, limited, say=said.append, executor=serial(plan, tick))
    assert now[0] <= 100.0, "over before the end of the budget"
    states = [trial.state for trial in study_of(plan).trials]
    assert states == [TrialState.COMPLETE, TrialState.RUNNING]
    assert said[-2] == "search: the time is used up; the same command goes on with 2 more"
    tune.run(plan, say=said.append, executor=serial(plan))
    assert study_of(plan).unfinished == 0
    assert len(starts(plan.folder.path / "trial-0001")) == 2


def test_a_refused_combination_fails_one_trial_and_the_search_goes_on(make_plan, serial, said):
    space = {"train.epochs": {"grid": [2, 5]}, "train.min_epochs": {"grid": [1, 4]}}
    plan = make_plan(
        {"space": space, "sampler": "grid"},
        train={"epochs": 5, "batch_size": 24},
    )
    tune.run(plan, say=said.append, executor=serial(plan))
    trials = study_of(plan).trials
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    assert [trial.params for trial in failed] == [{"train.epochs": 2, "train.min_epochs": 4}]
    assert "train.min_epochs (4) is larger than train.epochs (2)" in failed[0].user_attrs["reason"]
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) == 3
    assert any("failed: " in line and "is larger than" in line for line in said)


def test_a_search_whose_first_trials_all_fail_stops_and_says_why(make_plan, serial, said):
    space = {"train.epochs": {"choice": [2, 3, 5]}, "train.min_epochs": {"choice": [1, 4]}}
    points = [{"train.epochs": epochs, "train.min_epochs": 4} for epochs in (2, 3)]
    search = {"space": space, "points": points, "first_failures": 2, "trials": 5}
    plan = make_plan(search, train={"epochs": 5, "batch_size": 24})
    wanted = r"(?s)first 2 trials all failed:.*trial 0: .*\(4\) is larger.*trial 1: .*another name"
    for _ in range(2):
        with pytest.raises(InputError, match=wanted):
            tune.run(plan, say=said.append, executor=serial(plan))
    assert len(study_of(plan).trials) == 2


def test_a_metric_that_never_appears_stops_the_search_at_its_first_epoch(make_plan, serial, said):
    plan = make_plan({"space": SPACE, "trials": 3, "metrics": {"accuracy": "max"}})
    wanted = r"metrics.accuracy: trial-0000 has no such .* it has auprc, auroc, ece, f1, loss"
    with pytest.raises(InputError, match=wanted):
        tune.run(plan, say=said.append, executor=serial(plan))
    assert len(study_of(plan).trials) == 1


def test_folders_that_belong_to_something_else_are_refused(make_plan, serial, said):
    plan = make_plan({"space": SPACE, "trials": 1})
    folder = tune.run(plan, say=said.append, executor=serial(plan))
    with (
        lineage.locked(RunFolder(folder)),
        pytest.raises(InputError, match="by another process"),
    ):
        tune.run(plan, say=said.append, executor=serial(plan))
    other = make_plan({"space": {"optim.lr": {"log": [1e-6, 1e-1]}}})
    with pytest.raises(InputError, match="another search: space differ"):
        tune.run(other, say=said.append, executor=serial(other))
    with pytest.raises(InputError, match=r"its study is .*journal.log; leave --storage out"):
        tune.run(replace(plan, storage="sqlite:///x.db"), executor=serial(plan))
    (folder / "journal.log").unlink()
    with pytest.raises(InputError, match=r"journal.log is missing"):
        tune.run(plan, say=said.append, executor=serial(plan))
    with pytest.raises(InputError, match=r"is a run's folder"):
        tune.run(replace(plan, name="search/trial-0000"), executor=serial(plan))


def test_a_warm_start_tries_the_best_of_an_earlier_search_first(make_plan, serial, said):
    earlier = make_plan({"space": SPACE, "trials": 4}, name="earlier")
    folder = tune.run(earlier, say=said.append, executor=serial(earlier))
    best = [trial.params for trial in study_of(earlier).best(2)]
    space = {**SPACE, "optim.clip_norm": {"log": [0.1, 10.0]}}
    plan = make_plan({"space": space, "trials": 2, "warm_start": str(folder), "top": 2}, "later")
    tune.run(plan, say=said.append, executor=serial(plan))
    tried = [trial.params for trial in study_of(plan).trials]
    assert [{path: each[path] for path in SPACE} for each in tried] == best
    far = {"optim.lr": {"log": [1e-9, 1e-8]}}
    none = make_plan({"space": far, "warm_start": str(folder)}, "none")
    with pytest.raises(InputError, match="no value of the best trials"):
        tune.run(none, say=said.append, executor=serial(none))
    absent = make_plan({"space": SPACE, "warm_start": str(folder / "nowhere")}, "absent")
    with pytest.raises(InputError, match="no search in it"):
        tune.run(absent, say=said.append, executor=serial(absent))


def test_budgets_say_what_is_wrong_with_them():
    evening = datetime.datetime(2026, 3, 1, 22, 30)  # noqa: DTZ001
    assert budget.seconds_until("06:00", evening) == 7.5 * 3600
    assert budget.seconds_until("22:31", evening) == 60
    for text in ("25:00", "6", "06:60", "soon"):
        with pytest.raises(InputError, match="write a time of day"):
            budget.seconds_until(text, evening)
    with pytest.raises(InputError, match="--hours 0: give a number above 0"):
        budget.budget(0.0, None, None, gpus=0)
    with pytest.raises(InputError, match="--gpu-hours: the run uses no GPU"):
        budget.budget(None, 1.0, None, gpus=0)
    both = budget.budget(1.0, 2.0, "06:00", gpus=1)
    assert both.seconds <= 3600
    assert both.used_up(1.9) is None
    assert both.used_up(2.0) == "2 GPU-hours are used up"


def test_hours_are_those_of_all_workers_and_starts(make_plan, serial, said, tmp_path):
    lines = []
    for first, world in ((100.0, 2), (1000.0, 3)):
        start = {"event": "start", "updates": 0, "world": world}
        lines += [
            {"kind": "event", "epoch": 0, "step": 0, "time": first, "values": start},
            {"kind": "train", "epoch": 0, "step": 1, "time": first + 360, "values": {}},
        ]
    for number, part in enumerate((lines[:2], lines[2:]), 1):
        folder = tmp_path / "one" / "metrics" / f"attempt-{number}"
        folder.mkdir(parents=True)
        text = "".join(metrics_log.json.dumps(line) + "\n" for line in part)
        (folder / "part-00001.jsonl").write_text(text)
    assert cost.worker_hours(tmp_path / "one" / "metrics") == pytest.approx(0.5)
    scaling = make_plan({"space": SPACE}).run.scaling
    assert cost.Meter(scaling).gpu_hours([tmp_path / "one"], ()) == 0
    gpus = scaling.model_copy(update={"use_gpu": True})
    meter = cost.Meter(gpus)
    assert meter.gpu_hours([tmp_path / "one"], {tmp_path / "one"}) == pytest.approx(0.5)
