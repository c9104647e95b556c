"""Rates by prefix, frozen groups, phases, clipping, bf16."""

from __future__ import annotations

import pytest
import torch

from data.errors import InputError
from fusion.training import loop, optimizers
from fusion.training.optim import OptimConfig, rate
from fusion.training.predict import predict


def weights(session):
    return {name: value.clone() for name, value in session.strategy.model.state_dict().items()}


def moved(session, before):
    after = session.strategy.model.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def one_epoch(harness, tmp_path, **block):
    block = {"train": {"epochs": 1}, **block}
    job = harness.Job(folder=str(tmp_path), out="", strategy="single", **block)
    session = harness.session(job)
    before = weights(session)
    loop.fit(session)
    return session, before


def test_the_longest_prefix_gives_the_rate():
    config = OptimConfig(lr=0.1, group_lr={"a": 0.2, "a.b": 0.3})
    assert [rate(name, config) for name in ("a.x", "a.b.x", "a.b", "ab.x", "c")] == [
        0.2,
        0.3,
        0.3,
        0.1,
        0.1,
    ]


def test_a_frozen_group_stays_bit_identical_with_its_buffers(harness, tmp_path):
    session, before = one_epoch(
        harness,
        tmp_path,
        options={"batch_norm": True, "dropout": 0.2},
        optim={"group_lr": {"cxr": 0.0, "norm": 0.0}},
    )
    changed = moved(session, before)
    assert {"ehr.weight", "ehr.bias", "head.weight", "head.bias"} <= changed
    assert not [name for name in changed if name.startswith(("cxr", "norm"))]


def test_without_freezing_they_move(harness, tmp_path):
    session, before = one_epoch(harness, tmp_path, options={"batch_norm": True})
    assert {"norm.running_mean", "cxr.weight", "norm.weight"} <= moved(session, before)


def test_a_group_moves_by_its_own_rate(harness, tmp_path):
    """Adam's first step is the rate, whatever the gradient."""
    job = harness.Job(
        folder=str(tmp_path),
        out="",
        strategy="single",
        optim={"lr": 0.01, "group_lr": {"ehr": 0.1}},
    )
    session = harness.session(job)
    loop.start(session)
    before = weights(session)
    share = next(session.train.epoch(0))
    loop.train_step(session, share, loop.census(share, session.strategy.model))
    after = session.strategy.model.state_dict()
    for name, step in (("ehr.bias", 0.1), ("head.bias", 0.01)):
        size = (after[name] - before[name]).abs()
        assert torch.allclose(size, torch.full_like(size, step), rtol=1e-3)


def test_a_prefix_of_nothing_is_refused_with_a_guess(harness):
    job = harness.Job(folder="", out="", strategy="single", optim={"group_lr": {"hedd": 0.1}})
    with pytest.raises(InputError, match=r"optim\.group_lr.*'hedd'; did you mean 'head'"):
        harness.session(job)


def test_freezing_a_whole_phase_is_refused(harness):
    job = harness.Job(
        folder="",
        out="",
        strategy="single",
        options={"phased": True},
        optim={"group_lr": {"cxr": 0.0, "image_head": 0.0}},
    )
    with pytest.raises(InputError, match="phase 'images' has no trainable parameter"):
        harness.session(job)


def test_a_phase_steps_its_own_parameters_as_often_as_it_says(harness, tmp_path):
    job = harness.Job(folder=str(tmp_path), out="", strategy="single", options={"phased": True})
    session = harness.session(job)
    loop.start(session)
    stepped = []
    model = session.strategy.model
    for phase, optimizer in zip(model.phases, session.strategy.optimizers, strict=True):
        optimizer.register_step_pre_hook(
            lambda *_, name=phase.name: stepped.append((name, weights(session)))
        )
    share = next(session.train.epoch(0))
    loop.train_step(session, share, loop.census(share, session.strategy.model))
    assert [name for name, _ in stepped] == ["images", "images", "rest"]
    images = {"cxr.weight", "cxr.bias", "image_head.weight", "image_head.bias"}
    rest = {"ehr.weight", "ehr.bias", "head.weight", "head.bias"}
    first, last = stepped[0][1], stepped[2][1]
    assert {name for name in first if not torch.equal(first[name], last[name])} == images
    assert moved(session, last) == rest


def test_clipping_bounds_the_norm_of_the_whole_gradient(harness, tmp_path):
    def gradient(limit):
        job = harness.Job(
            folder=str(tmp_path), out="", strategy="single", optim={"clip_norm": limit}
        )
        session = harness.session(job)
        loop.start(session)
        norms = []
        model = session.strategy.model
        session.strategy.optimizers[0].register_step_pre_hook(
            lambda *_: norms.append(
                torch.cat([value.grad.flatten() for value in model.parameters()]).clone()
            )
        )
        share = next(session.train.epoch(0))
        loop.train_step(session, share, loop.census(share, session.strategy.model))
        return norms[0]

    free, clipped = gradient(None), gradient(0.01)
    assert free.norm() > 0.1
    torch.testing.assert_close(clipped.norm(), torch.tensor(0.01), rtol=1e-4, atol=0)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_not_finite_is_stopped_too(harness, tmp_path):
    job = harness.Job(folder=str(tmp_path), out="", strategy="single")
    session = harness.session(job)
    session.strategy.model.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weights(session)
    with pytest.raises(loop.NonFiniteLossError, match="gradient is NaN or infinite at epoch 0"):
        loop.fit(session)
    assert not moved(session, before)


def test_bf16_and_channels_last_train_close_to_fp32(harness, tmp_path):
    plain, _ = one_epoch(harness, tmp_path / "fp32")
    mixed, _ = one_epoch(
        harness,
        tmp_path / "bf16",
        train={"epochs": 1, "precision": "bf16", "channels_last": True},
    )
    assert all(value.dtype == torch.float32 for value in weights(mixed).values())
    losses = [
        [line["values"]["loss"] for line in session.log.lines if line["kind"] == "train"]
        for session in (plain, mixed)
    ]
    assert losses[0] != losses[1], "bf16 was on"
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_predict_leaves_the_model_in_its_mode_and_keeps_features(harness):
    job = harness.Job(folder="", out="", strategy="single", options={"batch_norm": True})
    session = harness.session(job)
    model = session.strategy.model
    optimizers.train_mode(model)
    model.norm.eval()
    before = weights(session)
    batches = list(session.val.epoch(0))
    predictions = predict(model, [None, *batches], session.task, features=("fused",))
    assert model.training
    assert not model.norm.training
    assert not moved(session, before)
    assert predictions.rows.tolist() == list(range(10))
    assert predictions.features["fused"].shape == (10, 8)
    assert predictions.probabilities.shape == (10, 3)
    alone = predict(model, [harness.collate(harness.dataset(10, seed=5)[7:8])], session.task)
    assert predictions.logits[7] == pytest.approx(alone.logits[0], abs=1e-5)
