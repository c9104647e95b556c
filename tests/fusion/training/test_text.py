"""The note model through the loop: every strategy alike, and its base left where it was read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.errors import InputError
from fusion import registry
from fusion.training import checkpoint
from fusion.training.references import fill

STRATEGIES = {
    "single": ("single", 1),
    "ddp-2": ("ddp", 2),
    "zero2-2": ("zero2", 2),
    "zero3-2": ("zero3", 2),
}
OPTIM = {"lr": 1e-2, "name": "adamw", "group_lr": {"head": 2e-2}, "clip_norm": 1.0}


@pytest.fixture(scope="module")
def job(harness, bases, tmp_path_factory):
    """`job(name, family, strategy, **more)`: a run of the note model on a tiny base."""
    root = tmp_path_factory.mktemp("text")

    def make(name, family="llama", strategy="single", *, folder=None, options=None, **more):
        kind, world = STRATEGIES[strategy]
        defaults = {
            "backbone": str(bases[family]),
            "random_weights": False,
            "adapter": "lora",
            "rank": 4,
            "adapter_dropout": 0.0,
            "base_precision": "fp32",
            "max_length": 64,
        }
        return harness.Job(
            folder=str(root / (folder or name) / "run"),
            out=str(root / name / "out"),
            model="note_llm",
            strategy=kind,
            world=world,
            options={**defaults, **(options or {})},
            optim=OPTIM,
            **{"train": {"epochs": 2, "tokens_per_pass": 48}, **more},
        )

    return make


@pytest.fixture(scope="module")
def outcomes(job, train_jobs, tmp_path_factory):
    blocks = {name: job(name, strategy=name) for name in STRATEGIES}
    blocks["whole"] = job("whole", train={"epochs": 2, "tokens_per_pass": None})
    blocks["packed-zero3-2"] = job(
        "packed-zero3-2", strategy="zero3-2", options={"layout": "packed"}
    )
    blocks["bert"] = job("bert", "bert", options={"adapter": "full"})
    blocks["bert-zero3-2"] = job(
        "bert-zero3-2", "bert", "zero3-2", options={"adapter": "full", "layout": "packed"}
    )
    done = train_jobs(tmp_path_factory.mktemp("jobs"), list(blocks.values()))
    return dict(zip(blocks, done, strict=True))


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("ddp-2", "single"),
        ("zero2-2", "single"),
        ("zero3-2", "single"),
        ("whole", "single"),
        ("packed-zero3-2", "single"),
        ("bert-zero3-2", "bert"),
    ],
)
def test_every_strategy_and_layout_trains_alike(outcomes, name, alone):
    """Micro-batches differ in number between the two workers: rows are grouped by their tokens."""
    several, single = outcomes[name], outcomes[alone]
    assert several.codes == [0] * several.job.world, several.stderr[-3000:]
    assert len(single.curve()) == 6
    assert single.curve()[-1] < 0.9 * single.curve()[0]
    np.testing.assert_allclose(several.curve(), single.curve(), atol=1e-5, rtol=0)
    np.testing.assert_allclose(several.scores(), single.scores(), atol=1e-5)
    for weights in several.weights:
        for key, value in single.weights[0].items():
            torch.testing.assert_close(weights[key], value, atol=1e-4, rtol=1e-3)
