"""Saved on x workers, resumed on y: the resume matrix. `pytest -s` prints the differences.

What is compared with a run that was never stopped: losses, weights, moments, schedule, position,
and the rows of every global step.
"""

from __future__ import annotations

import itertools
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

WORLDS = (1, 2, 3, 4)
PAIRS = list(itertools.product(WORLDS, WORLDS))
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
TOLERANCE = 1e-5
STOP_AT = 5
PLATEAU = {"lr": 2e-2, "schedule": "plateau", "plateau_patience": 0}
KINDS = {
    "full": {"optim": PLATEAU},
    # Like LoRA: most parameters are frozen as a base has them, and checkpoints leave them out.
    "frozen-base": {
        "optim": {**PLATEAU, "lr": 0.3, "group_lr": {"ehr": 0, "cxr": 0}},
        "init_from": {"ehr": "base.safetensors", "cxr": "base.safetensors"},
    },
}

pytestmark = pytest.mark.slow


def cells(kind):
    """(saved by, on x, resumed by, on y).

    All x and y under each strategy; each strategy to each other one, with a pair of x and y each.
    """
    across = list(itertools.permutations(STRATEGIES, 2))
    moved = [(x, y) for x, y in PAIRS if x != y]
    listed = [(s, x, t, y) for (s, t), (x, y) in zip(across, moved, strict=True)]
    if kind == "full":
        return listed + [(s, x, s, y) for s in STRATEGIES for x, y in PAIRS]
    return listed + [(s, x, s, y) for s, (x, y) in zip(STRATEGIES, moved[1::3], strict=True)]


@pytest.fixture(scope="module")
def base(harness, tmp_path_factory):
    torch.manual_seed(9)
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(harness.Toy().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def make(harness, base, tmp_path_factory):
    """A job of four epochs of three steps in a folder of its own."""
    root = tmp_path_factory.mktemp("matrix")

    def made(name, kind, folder=None, **block):
        block = {**KINDS.get(kind, {}), **block}
        init_from = {prefix: str(base) for prefix in block.pop("init_from", {})}
        block["train"] = {"epochs": 4, **block.get("train", {})}
        out, folder = root / name / "out", root / (folder or name) / "run"
        return harness.Job(folder=str(folder), out=str(out), init_from=init_from, **block)

    made.root = root
    return made


def copied(root, name, copy):
    """A second run that stands where the first was stopped."""
    shutil.copytree(root / name / "run", root / copy / "run")


@pytest.fixture(scope="module", params=KINDS)
def matrix(request, make, train_jobs):
    """Of a kind: the undisturbed run, and each continued one by (saved by, x, resumed by, y)."""
    kind, root = request.param, make.root
    jobs = [make(f"{kind}-whole", kind)]
    jobs += [
        make(f"{kind}-{strategy}-{x}", kind, world=x, strategy=strategy, stop_at=STOP_AT)
        for strategy in STRATEGIES
        for x in WORLDS
    ]
    whole, *halted = train_jobs(root / f"{kind}-first", jobs)
    assert all(set(each.codes) == {0} for each in halted), halted[0].stderr[-2000:]
    jobs = []
    for saved, x, resumed, y in cells(kind):
        name = f"{kind}-{saved}-{x}-{resumed}-{y}"
        copied(root, f"{kind}-{saved}-{x}", name)
        jobs.append(make(name, kind, world=y, strategy=resumed))
    continued = train_jobs(root / f"{kind}-second", jobs)
    return kind, whole, dict(zip(cells(kind), continued, strict=True))


def test_a_run_saved_on_x_workers_goes_on_on_y(matrix, make, resume):
    kind, whole, continued = matrix
    folder = make.root / f"{kind}-whole" / "run"
    rates = [line["values"]["lr"] for line in whole.results[0]["lines"] if line["kind"] == "val"]
    assert rates[-1] < rates[0], "the schedule did step"
    sys.stdout.write(f"\n{kind}\nsaved  x  resumed  y  loss     weights  moments\n")
    for (saved, x, resumed, y), outcome in continued.items():
        where = f"{kind}: saved by {saved} on {x}, resumed by {resumed} on {y}"
        assert outcome.codes == [0] * y, (where, outcome.stderr[-2000:])
        start = outcome.results[0]["lines"][0]["values"]
        assert (start["updates"], start["world"], start["skipped"]) == (STOP_AT, y, {}), where
        curve = np.array(outcome.curve()), np.array(whole.curve()[STOP_AT:])
        own = make.root / f"{kind}-{saved}-{x}-{resumed}-{y}" / "run"
        gap = {"loss": np.abs(curve[0] - curve[1]).max(), **resume.gap(own, folder)}
        shown = "  ".join(f"{value:.1e}" for value in gap.values())
        sys.stdout.write(f"{saved:5s} {x:2d}  {resumed:7s} {y:2d}  {shown}\n")
        assert gap["loss"] <= TOLERANCE, where
        assert gap["weights"] <= 10 * TOLERANCE, where
        assert gap["moments"] <= TOLERANCE, where
        assert resume.position(own) == resume.position(folder), where
        rows, all_rows = resume.rows_used(outcome), resume.rows_used(whole)
        assert rows == {at: used for at, used in all_rows.items() if at >= (1, STOP_AT - 3)}, where
        if kind == "frozen-base":
            held = resume.held(own)
            assert set(held.meta.base) == {"ehr", "cxr"}, where
            assert not any(name.startswith("ehr") for name in resume.state(own)["weights"]), where


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_on_as_many_workers_it_is_equal_to_the_bit(make, train_jobs, resume, strategy):
    """With dropout, and batch norms whose running statistics differ between workers."""
    block = {"strategy": strategy, "options": {"dropout": 0.4, "batch_norm": True}}
    jobs = {}
    for x in WORLDS:
        name = f"same-{strategy}-{x}"
        jobs[x, "whole"] = make(f"{name}-whole", "", world=x, **block)
        jobs[x, "halted"] = make(name, "", world=x, stop_at=STOP_AT, **block)
        jobs[x, "continued"] = make(f"{name}-continued", "", name, world=x, **block)
    ran = dict(
        zip(jobs, train_jobs(make.root / f"same-{strategy}", list(jobs.values())), strict=True)
    )
    for x in WORLDS:
        whole, continued = ran[x, "whole"], ran[x, "continued"]
        assert continued.codes == [0] * x, continued.stderr[-2000:]
        assert continued.curve() == whole.curve()[STOP_AT:]
        for ours, theirs in zip(continued.weights, whole.weights, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs), x
        folders = [make.root / f"same-{strategy}-{x}{end}" / "run" for end in ("", "-whole")]
        assert resume.gap(*folders) == {"weights": 0, "moments": 0}
        assert resume.held(folders[0]).meta.progress == resume.held(folders[1]).meta.progress
