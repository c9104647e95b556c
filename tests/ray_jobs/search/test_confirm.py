"""After the search: other seeds choose, the test split is looked at once, edges raise alarms."""

from __future__ import annotations

import json
import re
import time

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from fusion.training import metrics_log
from ray_jobs import evaluate, tune
from ray_jobs import predictions as prediction_file
from ray_jobs.search import confirm
from ray_jobs.search.alarm import alarms
from ray_jobs.search.budget import Budget
from ray_jobs.search.study import Study

SPACE = {"optim.lr": {"log": [1e-3, 1e-1]}}
EVALUATE = {"resamples": 60}


@pytest.fixture
def said():
    return []


def read(folder):
    return json.loads((folder / "results.json").read_text())


def test_other_seeds_choose_and_the_test_split_is_looked_at_once(
    make_plan, serial, said, monkeypatch
):
    search = {"space": SPACE, "trials": 3, "top": 2, "seeds": 2}
    plan = make_plan(search, confirm=True, evaluate=EVALUATE)
    evaluated = []
    real = evaluate.run

    def counted(folder, *, split=None):
        evaluated.append((folder.name, split))
        return real(folder, split=split)

    monkeypatch.setattr(evaluate, "run", counted)
    folder = tune.run(plan, say=said.append, executor=serial(plan))
    found = read(folder)
    study = Study(plan.search, plan.run, plan.folder.path)
    tops = [f"trial-{trial.number:04d}" for trial in study.best(2)]
    assert [row["name"] for row in found["candidates"]] == [*tops, "default"]
    for row in found["candidates"]:
        assert list(row["by_seed"]) == ["1", "2"], "no trial had these seeds"
        best = []
        for seed, value in row["by_seed"].items():
            lines = metrics_log.read(folder / f"{row['name']}-seed-{seed}" / "metrics")
            best.append(max(x["values"]["auroc"] for x in lines if x["kind"] == "val"))
            assert value == best[-1]
        assert row["mean"] == pytest.approx(np.mean(best))
    winner = max(found["candidates"][:2], key=lambda row: row["mean"])
    assert found["winner"] == winner["name"]
    assert found["optimism"] == pytest.approx(winner["searched"] - winner["mean"])
    default = found["candidates"][2]
    assert found["default_is_better"] == (default["mean"] >= winner["mean"])
    assert found["looks"] == 1
    names = [f"{name}-seed-{seed}" for name in (found["winner"], "default") for seed in (1, 2)]
    assert evaluated == [(name, "test") for name in names]

    again = tune.run(plan, say=said.append, executor=serial(plan))
    assert read(again) == found
    assert len(evaluated) == 4, "once"


@pytest.mark.slow
def test_test_scores_are_means_over_the_seeds_with_a_paired_difference(make_plan, serial, said):
    search = {"space": SPACE, "trials": 1, "top": 1, "seeds": 2}
    plan = make_plan(search, confirm=True, evaluate=EVALUATE)
    folder = tune.run(plan, say=said.append, executor=serial(plan))
    found = read(folder)["test"]

    def decided(targets, probabilities):
        return f1_score(targets, probabilities >= 0.5, zero_division=0)

    by_hand = {"auroc": roc_auc_score, "auprc": average_precision_score, "f1": decided}
    for metric, score in by_hand.items():
        means = {}
        for key, name in (("winner", "trial-0000"), ("default", "default")):
            each = []
            for seed in (1, 2):
                path = folder / f"{name}-seed-{seed}" / "eval" / "test" / "predictions.parquet"
                one = prediction_file.read(path)
                each.append(score(one.targets[:, 0], one.probabilities[:, 0]))
            means[key] = np.mean(each)
            assert found[metric][key]["value"] == pytest.approx(means[key], abs=1e-6)
        difference = found[metric]["difference"]
        assert difference["value"] == pytest.approx(means["winner"] - means["default"], abs=1e-6)
        assert difference["lower"] <= difference["value"] <= difference["upper"]


@pytest.mark.slow
def test_a_search_given_more_trials_says_how_often_it_was_tested(make_plan, serial, said):
    search = {"space": SPACE, "trials": 1, "top": 1, "seeds": 1}
    plan = make_plan(search, confirm=True, evaluate=EVALUATE)
    tune.run(plan, say=said.append, executor=serial(plan))
    more = make_plan({**search, "trials": 2}, confirm=True, evaluate=EVALUATE)
    found = read(tune.run(more, say=said.append, executor=serial(more)))
    assert found["looks"] == 2
    assert found["trials"] == 2


def test_a_budget_may_end_the_confirmation_too(make_plan, serial, said):
    search = {"space": SPACE, "trials": 1, "top": 1, "seeds": 2}
    plan = make_plan(search, confirm=True, evaluate=EVALUATE)
    now = [0.0]

    def tick(job, kind, value):
        if kind == "epoch" and job.name.startswith("default-seed-1"):
            now[0] = 95.0
            ask = plan.folder.asks / job.name
            while not ask.exists():
                time.sleep(0.05)

    limited = Budget(seconds=100.0, clock=lambda: now[0])
    folder = tune.run(plan, limited, say=said.append, executor=serial(plan, tick))
    assert not (folder / "results.json").exists()
    assert said[-2].endswith("the same command goes on with the other seeds")
    finished = sorted(path.parent.name for path in folder.glob("*-seed-*/outcome.json"))
    assert finished == ["trial-0000-seed-1"]
    tune.run(plan, say=said.append, executor=serial(plan))
    assert read(folder)["winner"] == "trial-0000"
    attempts = list((folder / "trial-0000-seed-1" / "metrics").glob("attempt-*"))
    assert len(attempts) == 1, "not trained twice"


def test_the_worse_direction_never_wins():
    rows = [
        {"name": "trial-0000", "mean": 0.3},
        {"name": "trial-0001", "mean": 0.2},
        {"name": "trial-0002", "mean": None},
        {"name": "default", "mean": 0.1},
    ]
    assert confirm.winner(rows, "max")["name"] == "trial-0000"
    assert confirm.winner(rows, "min")["name"] == "trial-0001"
    assert confirm.winner(rows[2:], "max") is None


@pytest.mark.parametrize(
    ("distribution", "value", "said"),
    [
        ({"log": [1e-3, 1e-1]}, 1e-2, None),
        ({"log": [1e-3, 1e-1]}, 0.095, r"highest edge, 0.1; try log: [0.01, 1] next"),
        ({"log": [1e-3, 1e-1]}, 1.05e-3, r"lowest edge, 0.001; try log: [0.0001, 0.01] next"),
        ({"grid": [1e-4, 1e-3, 1e-2]}, 1e-3, None),
        ({"grid": [1e-4, 1e-3]}, 1e-3, r"try grid: [0.0001, 0.001, 0.01] next"),
        ({"choice": [1e-4, 1e-3]}, 1e-3, None),
    ],
)
def test_a_best_value_at_an_edge_is_flagged_with_what_to_try(make_plan, distribution, value, said):
    plan = make_plan({"space": {"optim.lr": distribution}})
    found = alarms(plan.search, plan.run, {"optim.lr": value})
    if said is None:
        assert found == []
    else:
        assert said in found[0].text()
        assert found[0].text().startswith("optim.lr: the best value")


@pytest.mark.parametrize(
    ("path", "distribution", "value", "said"),
    [
        ("model.dropout", {"uniform": [0.1, 0.6]}, 0.11, "beyond which|try uniform: "),
        ("model.dropout", {"uniform": [0.0, 0.6]}, 0.0, "beyond which the config allows nothing"),
        ("model.dropout", {"uniform": [0.1, 0.8]}, 0.79, r"try uniform: \[0.45, 0.975\]"),
        ("model.hidden", {"int": [4, 12]}, 12, r"try int: \[8, 16\]"),
        ("train.patience", {"int": [1, 4]}, 1, "beyond which the config allows nothing"),
        ("model.dropout", {"grid": [0.0, 0.2, 0.4]}, 0.4, r"try grid: \[0, 0.2, 0.4, 0.6\]"),
    ],
)
def test_advice_stays_within_what_the_config_allows(make_plan, path, distribution, value, said):
    plan = make_plan({"space": {path: distribution}})
    (found,) = alarms(plan.search, plan.run, {path: value})
    assert re.search(said, found.text())


def test_values_that_a_condition_left_out_raise_no_alarm(make_plan):
    space = {
        "optim.schedule": {"choice": ["constant", "plateau"]},
        "optim.plateau_factor": {"uniform": [0.1, 0.9], "when": {"optim.schedule": "plateau"}},
    }
    plan = make_plan({"space": space})
    assert alarms(plan.search, plan.run, {"optim.schedule": "constant"}) == []
    values = {"optim.schedule": "plateau", "optim.plateau_factor": 0.9}
    assert [alarm.path for alarm in alarms(plan.search, plan.run, values)] == [
        "optim.plateau_factor"
    ]
