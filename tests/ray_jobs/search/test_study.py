"""The study: what is proposed, what is remembered, what is pruned; no Ray, no training."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data.errors import InputError
from ray_jobs import config as run_config
from ray_jobs.search.space import SearchConfig
from ray_jobs.search.study import Study

RUN = Path(run_config.__file__).parent / "configs" / "drfuse" / "drfuse-full.yaml"
SPACE = {"optim.lr": {"log": [1e-5, 1e-1]}, "model.lambda1": {"uniform": [-1.0, 1.0]}}


@pytest.fixture(scope="module")
def run():
    return run_config.load(RUN)[-1]


def search(**changes):
    return SearchConfig.model_validate(
        {"space": SPACE, "metrics": {"auprc": "max"}, "trials": 25, **changes}
    )


def score(values) -> float:
    """Highest, 0, at lr = 1e-3 and lambda1 = 0.3."""
    return -((math.log10(values["optim.lr"]) + 3) ** 2) - (values["model.lambda1"] - 0.3) ** 2


def advance(study: Study, trials: int) -> list[dict]:
    proposed = []
    for _ in range(trials):
        proposal = study.propose()
        assert proposal is not None
        proposed.append(proposal.values)
        study.complete(proposal.number, {"auprc": score(proposal.values)})
    return proposed


def test_it_finds_a_planted_optimum_and_knows_its_end(tmp_path, run) -> None:
    study = Study(search(trials=60), run, tmp_path)
    advance(study, 60)
    assert study.propose() is None
    best = study.best(1)[0].user_attrs["values"]
    assert abs(math.log10(best["optim.lr"]) + 3) < 0.4
    assert abs(best["model.lambda1"] - 0.3) < 0.25


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_restarts_change_no_proposal(tmp_path, run, sampler) -> None:
    whole = advance(Study(search(sampler=sampler), run, tmp_path / "whole"), 18)
    parts = []
    for _ in range(6):
        parts += advance(Study(search(sampler=sampler), run, tmp_path / "parts"), 3)
    assert parts == whole
    other = advance(Study(search(sampler=sampler, seed=1), run, tmp_path / "other"), 3)
    assert other != whole[:3]


def test_trials_left_running_come_first_with_their_values(tmp_path, run) -> None:
    study = Study(search(trials=3), run, tmp_path)
    first, second = study.propose(), study.propose()
    study.complete(first.number, {"auprc": 0.5})
    again = Study(search(trials=3), run, tmp_path)
    assert again.left == 2
    assert again.propose() == second
    third = again.propose()
    assert third.number == 2
    assert again.propose() is None


def test_a_grid_is_tried_once_each_in_a_seeded_order(tmp_path, run) -> None:
    space = {"model.lambda1": {"grid": [0, 0.1, 1]}, "optim.lr": {"grid": [1e-4, 1e-3]}}
    config = search(space=space, sampler="grid", trials=None)
    study = Study(config, run, tmp_path)
    assert study.limit == 6
    tried = advance(study, 4) + advance(Study(config, run, tmp_path), 2)
    assert Study(config, run, tmp_path).propose() is None
    expected = {(a, b) for a in (0, 0.1, 1) for b in (1e-4, 1e-3)}
    assert {(t["model.lambda1"], t["optim.lr"]) for t in tried} == expected


def test_points_are_tried_first_and_completed(tmp_path, run) -> None:
    points = [{"optim.lr": 1e-3, "model.lambda1": 0.5}, {"optim.lr": 1e-2}]
    tried = advance(Study(search(points=points), run, tmp_path), 3)
    assert tried[0] == points[0]
    assert tried[1]["optim.lr"] == 1e-2
    assert -1 <= tried[1]["model.lambda1"] <= 1


def test_asha_ends_the_worse_trials_after_the_minimum(tmp_path, run) -> None:
    pruner = {"name": "asha", "min_epochs": 2, "reduction_factor": 2}
    config = search(pruner=pruner, sampler="random", trials=16)
    study = Study(config, run, tmp_path)
    ended = {}
    for _ in range(16):
        proposal = study.propose()
        for epoch in range(1, 9):
            if study.report(proposal.number, epoch, proposal.number * epoch % 7):
                study.pruned(proposal.number)
                ended[proposal.number] = epoch
                break
        else:
            study.complete(proposal.number, {"auprc": 0.0})
    assert ended
    assert min(ended.values()) >= 2
    assert len(ended) < 16


def test_several_metrics_give_a_front(tmp_path, run) -> None:
    study = Study(search(metrics={"auprc": "max", "ece": "min"}), run, tmp_path)
    for auprc, ece in [(0.5, 0.3), (0.6, 0.2), (0.7, 0.4), (0.4, 0.5)]:
        study.complete(study.propose().number, {"auprc": auprc, "ece": ece, "loss": 1.0})
    assert {tuple(trial.values) for trial in study.best(5)} == {(0.6, 0.2), (0.7, 0.4)}


def test_a_search_stops_where_its_first_trials_all_fail(tmp_path, run) -> None:
    study = Study(search(first_failures=2), run, tmp_path)
    study.fail(study.propose().number, "train.epochs: too few")
    assert study.hopeless() is None
    study.fail(study.propose().number, "the loss is NaN")
    assert "trial 1: the loss is NaN" in study.hopeless()
    other = Study(search(first_failures=2), run, tmp_path / "other")
    other.complete(other.propose().number, {"auprc": 1.0})
    other.fail(other.propose().number, "x")
    other.fail(other.propose().number, "x")
    assert other.hopeless() is None


def test_a_metric_that_never_appears_is_named(tmp_path, run) -> None:
    study = Study(search(metrics={"auroc": "max"}), run, tmp_path)
    with pytest.raises(InputError, match=r"metrics.auroc: .*it has auprc, loss"):
        study.complete(study.propose().number, {"auprc": 1.0, "loss": 0.1})


def test_the_storage_of_another_search_is_refused(tmp_path, run) -> None:
    Study(search(), run, tmp_path)
    Study(search(trials=99, top=1), run, tmp_path)  # budgets may change
    with pytest.raises(InputError, match="another search: space differ"):
        Study(search(space={"optim.lr": {"log": [1e-6, 1e-1]}}), run, tmp_path)
    other = run.model_copy(update={"seed": 9})
    with pytest.raises(InputError, match="run differ"):
        Study(search(), other, tmp_path)


def test_a_database_serves_as_well_and_its_password_is_not_shown(tmp_path, run) -> None:
    url = f"sqlite:///{tmp_path}/search.db"
    first = advance(Study(search(), run, url), 3)
    assert [t.user_attrs["values"] for t in Study(search(), run, url).trials] == first
    with pytest.raises(InputError) as caught:
        Study(search(), run, "nosuch://me:secret@host/db")
    assert "secret" not in str(caught.value)


def test_a_killed_driver_loses_no_finished_trial(tmp_path, run) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_study import *\n"
        f"run = run_config.load(RUN)[-1]; study = Study(search(), run, Path({str(tmp_path)!r}))\n"
        "advance(study, 4); study.propose(); print('ready', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout.readline() == "ready\n"
        os.kill(driver.pid, signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL
    study = Study(search(), run, tmp_path)
    assert len(study.best(9)) == 4
    assert study.propose().number == 4
