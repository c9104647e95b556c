"""The search space: what it proposes, and what it refuses before anything starts."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import yaml

from data.errors import InputError
from ray_jobs import config as run_config
from ray_jobs.config_paths import keys, replaced
from ray_jobs.search import space

CONFIGS = Path(run_config.__file__).parent / "configs"
SHIPPED = {
    "drfuse-paper": "drfuse/drfuse-full.yaml",
    "drfuse-carebench": "drfuse/drfuse-full.yaml",
    "drfuse-wide": "drfuse/drfuse-full.yaml",
    "medfuse-lr": "medfuse/medfuse-pt-mortality.yaml",
    "medfuse-llm": "medfuse_llm/joint.yaml",
    "medfuse-llm-lambda": "medfuse_llm/full.yaml",
    "medfuse-unpaired": "medfuse/medfuse-optimal-mortality.yaml",
}


@pytest.fixture(scope="module")
def run():
    return run_config.load(CONFIGS / "drfuse" / "drfuse-full.yaml")[-1]


@pytest.fixture
def load(tmp_path, run):
    def _load(**document):
        path = tmp_path / "SEARCH.yaml"
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        return space.load(path, run)

    return _load


def test_every_shipped_space_fits_its_run() -> None:
    assert {path.stem for path in (CONFIGS / "search").glob("*.yaml")} == set(SHIPPED)
    for name, file in SHIPPED.items():
        last = run_config.load(CONFIGS / file)[-1]
        search = space.load(CONFIGS / "search" / f"{name}.yaml", last)
        assert search.trials or search.grid_size


def test_the_papers_grid_has_54_points(run) -> None:
    assert space.load(CONFIGS / "search" / "drfuse-paper.yaml", run).grid_size == 54


def test_proposals_lie_in_their_ranges_and_conditions_hold(load) -> None:
    search = load(
        space={
            "optim.lr": {"log": [1e-5, 1e-2]},
            "model.layers": {"int": [1, 3]},
            "optim.schedule": {"choice": ["constant", "plateau"]},
            "optim.plateau_factor": {"uniform": [0.1, 0.9], "when": {"optim.schedule": "plateau"}},
        }
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    seen = []
    for _ in range(200):
        values = search.suggest(study.ask())
        assert 1e-5 <= values["optim.lr"] <= 1e-2
        assert values["model.layers"] in (1, 2, 3)
        assert ("optim.plateau_factor" in values) == (values["optim.schedule"] == "plateau")
        seen.append(values["optim.lr"])
    below = sum(value < 10**-3.5 for value in seen) / len(seen)
    assert 0.4 < below < 0.6, "half of a log-uniform range lies below its geometric mean"
    assert search.metrics == {"auprc": "max"}, "by default what the run selects by"


def test_a_loss_that_selects_is_searched_for_its_lowest(tmp_path, run) -> None:
    document = {**run.model_dump(mode="json"), "model": {"name": "mltm"}, "task": "diagnoses"}
    document["train"]["selection_metric"] = "masked"
    path = tmp_path / "SEARCH.yaml"
    path.write_text(yaml.safe_dump({"space": {"optim.lr": {"log": [1e-5, 1e-2]}}, "trials": 2}))
    search = space.load(path, run_config.from_document(document, place="here"))
    assert search.metrics == {"masked": "min"}


def test_a_config_takes_values_at_paths(run) -> None:
    new = replaced(run, {"optim.lr": 5e-4, "optim.group_lr": {}, "optim.group_lr.ehr.layers": 1e-5})
    assert new.optim.lr == 5e-4
    assert new.optim.group_lr == {"ehr.layers": 1e-5}
    assert replaced(run, {}) == run
    assert keys(run, "optim.group_lr.a.b") == ["optim", "group_lr", "a.b"]


LR = {"log": [1e-5, 1e-2]}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"space": {"optim.lrr": LR}}, r"space.optim.lrr: .*did you mean 'lr'"),
        ({"space": {"optim": LR}}, "it is a block"),
        ({"space": {"optim.lr.x": LR}}, "single value"),
        ({"space": {"optim.lr": {"log": [0, 1]}}}, "above 0, but got 0"),
        ({"space": {"optim.lr": {"uniform": [1, 1]}}}, "range is empty"),
        ({"space": {"optim.lr": {"uniform": [0.1, 1e999]}}}, "finite"),
        ({"space": {"optim.lr": {"choice": []}}}, "choice is empty"),
        ({"space": {"optim.lr": {"choice": [1e-3, 1e-3]}}}, "twice"),
        ({"space": {"optim.lr": {}}}, "exactly one of"),
        ({"space": {"optim.lr": {**LR, "choice": [1]}}}, "exactly one of"),
        ({"space": {"optim.lr": {"logg": [1, 2]}}}, "logg: unknown key"),
        ({"space": {"model.lambda1": {"uniform": [-1, 1]}}}, r"space.model.lambda1: .*-1"),
        ({"space": {"model.dropout": {"uniform": [0, 1]}}}, "less than 1"),
        ({"space": {"model.name": {"choice": ["drfuse"]}}}, "one search for each"),
        ({"space": {"seed": {"int": [0, 9]}}}, "the best of many seeds is luck"),
        (
            {"space": {"optim.lr": LR}, "points": [{"optim.lr": 0.5}]},
            r"points\[0\]: optim.lr=0.5 is outside of its range",
        ),
        ({"space": {"scaling.num_workers": {"int": [1, 2]}}}, "does not change"),
        ({"space": {"optim.lr": {**LR, "when": {"optim.name": "adam"}}}}, "come first"),
        (
            {
                "space": {
                    "optim.name": {"choice": ["adam", "adamw"]},
                    "optim.lr": {**LR, "when": {"optim.name": "sgd"}},
                }
            },
            "never 'sgd'",
        ),
        ({"space": {"optim.lr": LR}, "sampler": "grid"}, "needs `grid:` lists"),
        ({"space": {"optim.lr": LR}, "points": [{"optim.lr": -1}]}, r"points\[0\]"),
        ({"space": {"optim.lr": LR}, "points": [{"model.lambda1": 1}]}, "is not searched"),
        ({"space": {}}, "at least 1"),
        (
            {
                "space": {"optim.lr": LR},
                "metrics": {"auprc": "max", "loss": "min"},
                "pruner": {"name": "asha"},
            },
            "single metric",
        ),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(load, document, message) -> None:
    with pytest.raises(InputError, match=message):
        load(**document)


def test_everything_wrong_is_said_at_once(load) -> None:
    with pytest.raises(InputError) as caught:
        load(space={"optim.lrr": LR, "model.lambda1": {"uniform": [-1, 1]}})
    assert "optim.lrr" in str(caught.value)
    assert "model.lambda1" in str(caught.value)
