"""The learning rate over a run's updates, against torch's schedulers, and through a stop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from fusion.training.optim import OptimConfig
from fusion.training.optimizers import Schedule

UPDATES = 40


def torchs(name: str, warm: int, final: float) -> list[float]:
    """The factors of torch's own schedulers."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    falling = {
        "constant": lambda: LinearLR(optimizer, 1.0, 1.0),
        "linear": lambda: LinearLR(optimizer, 1.0, final, UPDATES - warm),
        "cosine": lambda: CosineAnnealingLR(optimizer, UPDATES - warm, final),
    }[name]
    if warm:
        rising = LinearLR(optimizer, 1 / warm, 1.0, warm - 1)
        scheduler = SequentialLR(optimizer, [rising, falling()], [warm])
    else:
        scheduler = falling()
    found = []
    for _ in range(UPDATES + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.25])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_it_is_torchs(name, warmup, final):
    schedule = Schedule(OptimConfig(schedule=name, warmup=warmup, final=final), UPDATES)
    found = [schedule.factor(update) for update in range(UPDATES + 1)]
    assert found == pytest.approx(torchs(name, round(warmup * UPDATES), final), abs=1e-6)
    assert len(set(found)) > 1 or (name == "constant" and not warmup)


def test_a_run_that_was_stopped_goes_on_at_its_rate(harness, tmp_path):
    """Three epochs of three steps; each group by its own initial rate."""
    optim = {"lr": 1e-2, "schedule": "cosine", "warmup": 0.3, "group_lr": {"head": 2e-2}}
    job = harness.Job(
        str(tmp_path / "whole"), "", strategy="single", optim=optim, train={"epochs": 3}
    )

    def rates(job):
        session = harness.session(job)
        ending = harness.loop.fit(session)
        lines = [line for line in session.log.lines if line["kind"] == "train"]
        return ending, [line["values"]["lr"] for line in lines], session

    ending, whole, session = rates(job)
    assert ending == "epochs"
    schedule = Schedule(OptimConfig(**optim), 9)
    # A line is written after its step, with the rate that the step had.
    assert whole == pytest.approx([1e-2 * schedule.factor(update) for update in range(9)])
    groups = session.strategy.optimizers[0].param_groups
    assert {group["initial_lr"] for group in groups} == {1e-2, 2e-2}
    assert len({group["lr"] / group["initial_lr"] for group in groups}) == 1
    stopped = replace(job, folder=str(tmp_path / "stopped"), stop_at=4)
    assert rates(stopped)[0] == "interrupted"
    assert rates(replace(stopped, stop_at=-1))[1] == whole[4:]
