"""Gradients are handed on in one order, whatever order they come in."""

from __future__ import annotations

import itertools
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from data.errors import InputError
from fusion.model import Phase
from fusion.training.gradient_order import GradientOrder
from fusion.training.optim import OptimConfig
from fusion.training.optimizers import build_optimizers, build_phased_optimizer
from fusion.training.zero import Fragment, Zero


@pytest.mark.parametrize("arrivals", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("missing", [None, 0, 1, 2])
def test_one_order_for_every_order_of_arrival(arrivals, missing):
    parameters = [nn.Parameter(torch.ones(n + 1)) for n in range(3)]
    handed = []
    order = GradientOrder([parameters], lambda each: handed.append((len(each), each.grad.clone())))
    for _ in range(2):
        handed.clear()
        order.start(0)
        for number in arrivals:
            if number != missing:
                parameters[number].grad = torch.full((number + 1,), float(number + 5))
                order.arrive(parameters[number])
        order.finish()
        assert [size for size, _ in handed] == [3, 2, 1]
        for size, gradient in handed:
            assert torch.equal(
                gradient, torch.full((size,), 0.0 if size - 1 == missing else size + 4.0)
            )
        for parameter in parameters:
            parameter.grad = None


def test_gradients_go_straight_through_in_the_reverse_of_the_declaration():
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    handed = []
    order = GradientOrder([parameters], handed.append)
    order.start(0)
    for count, parameter in enumerate(reversed(parameters)):
        parameter.grad = torch.ones(1)
        order.arrive(parameter)
        assert len(handed) == count + 1


def test_gradients_of_another_phase_are_dropped():
    own, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    handed = []
    order = GradientOrder([[own], [other]], handed.append)
    order.start(1)
    for parameter in (own, other):
        parameter.grad = torch.ones(1)
        order.arrive(parameter)
    assert own.grad is None
    assert handed == [other]


def test_one_optimizer_for_all_phases_moves_as_one_for_each():
    phases = (Phase("first", ("0", "1")), Phase("second", ("1", "2")))
    config = OptimConfig(lr=0.1, weight_decay=0.1, name="adamw", group_lr={"2": 0.05})

    def network():
        torch.manual_seed(1)
        return nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))

    apart, together = network(), network()
    optimizers = build_optimizers(apart, phases, config)
    phased = build_phased_optimizer(together, phases, config)
    for _ in range(3):
        for number, optimizer in enumerate(optimizers):
            for model in (apart, together):
                model.zero_grad()
                model(torch.ones(1, 2)).square().sum().backward()
            optimizer.step()
            phased.phase = number
            phased.step()
    for ours, theirs in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=0)
    assert len(phased.states[0]) == len(phased.states[1]) == 4


def test_unequal_counts_of_updates_are_refused():
    model = nn.Sequential(nn.Linear(1, 1))
    model.phases = (Phase(),)
    zero = object.__new__(Zero)
    flat = torch.zeros(2)
    zero.model = model
    zero._client = SimpleNamespace(states=[defaultdict(dict)])
    zero._fragment = lambda parameter: Fragment(flat, 0, 0, 1)
    steps = {"step/all/0.weight": torch.tensor(3.0), "step/all/0.bias": torch.tensor(2.0)}
    with pytest.raises(InputError, match=r"scaling\.strategy=ddp"):
        zero.load_moments(steps)
    zero._client.states[0].clear()
    with pytest.raises(InputError, match="which this model has not"):
        zero.load_moments({"step/all/0.weight": torch.tensor(3.0), "step/all/9": torch.tensor(1.0)})
