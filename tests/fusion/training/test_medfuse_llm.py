"""MEDFuse through the loop: alike on several workers, and on branches trained before and frozen.

17 rows in batches of 8 leave a last batch of one row, of which one of two workers has nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fusion.training import checkpoint

STRATEGIES = {"ddp-2": ("ddp", 2), "zero2-3": ("zero2", 3), "zero3-2": ("zero3", 2)}
BASE = {
    "adapter": "lora",
    "rank": 4,
    "adapter_dropout": 0.0,
    "base_precision": "fp32",
    "max_length": 64,
    "random_weights": False,
}
OPTIM = {"lr": 1e-2, "group_lr": {"critic": 2e-2}, "clip_norm": 1.0}
FROZEN = {"lr": 1e-2, "group_lr": {"text": 0, "labs": 0}}


@pytest.fixture(scope="module")
def job(harness, bases, tmp_path_factory):
    """`job(name, strategy, **more)`: a run on a tiny base, without dropout."""
    root = tmp_path_factory.mktemp("medfuse-llm")

    def make(name, strategy="single", *, model="medfuse_llm", options=None, **more):
        kind, world = STRATEGIES.get(strategy, ("single", 1))
        own = {"dropout": 0.0, "critic_updates": 2} if model == "medfuse_llm" else {}
        return harness.Job(
            folder=str(root / name / "run"),
            out=str(root / name / "out"),
            model=model,
            strategy=kind,
            world=world,
            options={**BASE, "backbone": str(bases["llama"]), **own, **(options or {})},
            **{"optim": OPTIM, **more},
        )

    return make


@pytest.fixture(scope="module")
def outcomes(job, train_named):
    jobs = {name: job(name, name) for name in ("single", "ddp-2")}
    jobs["text"] = job("text", model="note_llm", optim={"lr": 1e-2}, train={"epochs": 1})
    sources = {"text": jobs["text"].folder, "labs": jobs["single"].folder}
    jobs["frozen"] = job("frozen", init_from=sources, optim=FROZEN, train={"epochs": 5})
    return train_named(jobs)


def comparable(name, value):
    """Without keys' biases, which add the same to every place of a softmax: rounding alone."""
    if name.endswith("in_proj_bias") or ("projections" in name and name.endswith("1.bias")):
        query, _, values = value.chunk(3)
        return torch.cat((query, values))
    return value


def assert_same(several, alone):
    assert several.codes == [0] * several.job.world, several.stderr[-3000:]
    for name in ("critic/nll", "all/vclub", "all/focal"):
        assert len(alone.curve(name)) == 6
        np.testing.assert_allclose(several.curve(name), alone.curve(name), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(several.scores(), alone.scores(), atol=1e-5)
    for weights in several.weights:
        for name, value in alone.weights[0].items():
            found, expected = comparable(name, weights[name]), comparable(name, value)
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


def test_two_workers_train_as_one_does(outcomes):
    """The double sum is over the rows of both."""
    assert_same(outcomes["ddp-2"], outcomes["single"])
    curve = outcomes["single"].curve("critic/nll")
    assert curve[-1] < curve[0]


def test_the_loss_that_is_shown_is_the_network_s(outcomes):
    """A critic's likelihood is another loss; lambda rises over the first epoch's three steps."""
    curves = outcomes["single"].curve
    focal, bound = np.array(curves("all/focal")), np.array(curves("all/vclub"))
    weight = 0.1 * np.array([1 / 3, 2 / 3, 1, 1, 1, 1])
    np.testing.assert_allclose(curves("loss"), focal + weight * bound, rtol=1e-5)


@pytest.mark.slow
def test_every_strategy_trains_alike(outcomes, job, train_named):
    others = train_named({name: job(name, name) for name in STRATEGIES if name != "ddp-2"})
    for outcome in others.values():
        assert_same(outcome, outcomes["single"])


def test_a_fusion_on_branches_that_are_frozen_as_they_were_trained(outcomes):
    frozen = outcomes["frozen"]
    assert frozen.codes == [0], frozen.stderr[-3000:]
    weights = frozen.weights[0]
    for prefix, source in (("text.", "text"), ("labs.", "single")):
        trained = outcomes[source]
        folder = Path(trained.job.folder)
        best, _ = checkpoint.read_weights(folder / "best")
        kept = {name: value for name, value in best.items() if name.startswith(prefix)}
        assert kept
        assert all(weights[name].equal(value) for name, value in kept.items())
    best, meta = checkpoint.read_weights(Path(frozen.job.folder) / "best")
    tops = {name.split(".")[0] for name in best}
    assert {"fusion", "head", "critic", "no_labs"} <= tops
    assert set(meta["referenced"]) == {"text"}
    curve = frozen.curve("all/focal")
    assert sum(curve[-3:]) < 0.9 * sum(curve[:3]), "by epoch"
