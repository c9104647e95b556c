"""Activation checkpointing: the second pass is the first one again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fusion import registry
from fusion.training.recompute import blocks, recompute


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lower, self.norm, self.upper = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, values):
        hidden = torch.relu(self.norm(self.lower(values)))
        return values + self.upper(nn.functional.dropout(hidden, 0.5, self.training))


def twins():
    torch.manual_seed(0)
    plain = nn.Sequential(Block(), Block(), nn.Linear(6, 2))
    twin = copy.deepcopy(plain)
    recompute(twin)
    return plain, twin


def step(model, values, between=lambda model: None):
    torch.manual_seed(5)
    loss = model(values).square().sum()
    between(model)
    loss.backward()
    return loss, [parameter.grad for parameter in model.parameters()], torch.rand(1)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_statistics_and_draws_are_those_without_it(training):
    values = torch.randn(8, 6)
    plain, twin = (model.train(training) for model in twins())
    # An encoder without rows is in evaluation mode during its forward pass only.
    expected = step(plain, values)
    found = step(twin, values, between=lambda model: model.train(not training))
    for ours, theirs in zip(found, expected, strict=True):
        assert all(map(torch.equal, ours, theirs)) if isinstance(ours, list) else ours == theirs
    for (name, ours), theirs in zip(twin.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert twin.training is (not training)


def test_only_the_inputs_of_blocks_are_kept():
    def kept(model):
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        )
        with hooks:
            model(torch.randn(64, 6))
        return sum(sizes)

    plain, twin = twins()
    assert kept(twin) < kept(plain) / 3


def test_nothing_is_run_twice_without_gradients():
    _, twin = twins()
    with torch.no_grad():
        twin(torch.randn(4, 6))
    assert int(twin[0].norm.num_batches_tracked) == 1


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("medfuse", {"cxr_encoder.layer1.0", "ehr_encoder.layers.0"}),
        ("drfuse", {"cxr_encoder.shared.layer4.0", "ehr_encoder.common"}),
    ],
)
def test_the_blocks_of_models(name, some, harness):
    kind = registry.get(name)
    model = kind(kind.tiny(), harness.SPEC)
    paths = {module: path for path, module in model.named_modules()}
    found = {paths[block] for block in blocks(model)}
    assert some <= found
    assert not any(
        inner != outer and inner.startswith(outer + ".") for inner in found for outer in found
    )
