"""What the log says of speed: planted waits, rows of all workers, FLOPs by hand, traces."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from data.tasks import task_spec
from fusion import hardware, registry
from fusion.tasks import Task
from fusion.training import loop
from fusion.training.config import TrainConfig
from fusion.training.flops import Work, count_flops
from fusion.training.speed import Speed

SPEC = task_spec("mortality")


class Clock:
    """Stands still unless it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class SlowStream:
    """Another stream, each share of which takes `seconds`."""

    def __init__(self, stream, clock, seconds) -> None:
        self.stream, self.clock, self.seconds = stream, clock, seconds

    @property
    def steps_per_epoch(self):
        return self.stream.steps_per_epoch

    def epoch(self, epoch, start_step=0):
        for share in self.stream.epoch(epoch, start_step):
            self.clock.now += self.seconds
            yield share


def _speed(lines):
    return [line["values"] for line in lines if line["kind"] == "speed"]


def test_a_planted_wait_for_data_is_seen(harness, tmp_path):
    job = harness.Job(str(tmp_path), "", strategy="single", train={"log_every_steps": 3})
    session, clock = harness.session(job), Clock()
    session.speed = Speed(clock=clock)
    session.train = SlowStream(session.train, clock, 3.0)

    def beat(stage, progress):
        # A step takes a second; what a validation or a checkpoint takes is no step's time.
        clock.now += {"step": 1.0, "validation": 50.0, "checkpoint": 70.0}.get(stage, 0.0)

    session.beat = beat
    loop.fit(session)
    lines = _speed(session.log.lines)
    assert len(lines) == 2, "17 rows in batches of 8: three steps an epoch, two epochs"
    for values in lines:
        assert values["data_wait"] == pytest.approx(0.75)
        assert values["step_s"] == pytest.approx(4.0)
        assert values["rows_per_s"] == pytest.approx(17 / 12)
        assert values["rss_gib"] > 0.05
        assert "mfu" not in values, "the peak of a CPU is not known"


def test_rows_of_all_workers_count(train_jobs, harness, tmp_path):
    job = harness.Job(str(tmp_path / "run"), str(tmp_path / "out"), world=2, rows=16)
    (outcome,) = train_jobs(tmp_path, [job])
    lines = _speed(outcome.results[0]["lines"])
    assert len(lines) == 4
    for values in lines:
        assert values["rows_per_s"] * values["step_s"] == pytest.approx(8, rel=1e-6)
        assert 0 <= values["data_wait"] <= 1


def test_flops_become_a_rate_and_a_share_of_the_peak(monkeypatch, harness, tmp_path):
    session = harness.session(harness.Job(str(tmp_path), "", strategy="single"))
    (share,) = list(harness.Rows(harness.dataset(8), 8).epoch(0))
    clock = Clock()
    flops = count_flops(
        lambda: registry.get("lstm")(registry.get("lstm").tiny(), harness.SPEC),
        Task(harness.SPEC),
        TrainConfig(),
        32,
    )
    speed = Speed(lambda size: flops, clock)
    for given in speed.waited([share, None]):
        clock.now += 2.0
        speed.stepped(given)
    monkeypatch.setattr("fusion.training.speed._peak", lambda device, precision: 1e6)
    values = speed.values(session.strategy, "fp32")
    lengths = share.lengths.double()
    work = Work(8, float(lengths.sum()), float(lengths.square().sum()), len(share.cxr))
    assert values["tflops"] == pytest.approx(flops.of(work) / 4.0 / 1e12)
    assert values["mfu"] == pytest.approx(flops.of(work) / 4.0 / 1e6)


def _hand_count(model, batch_rows, run):
    """Multiply-adds of every convolution and linear layer, twice that in FLOPs, thrice in training.

    The first convolution of an image has no input to send a gradient to.
    """
    total = 0.0

    def seen(module, inputs, output):
        nonlocal total
        if isinstance(module, nn.Conv2d):
            cost = 2 * output.numel() * module.weight[0].numel()
            first = module.in_channels == 3
        else:
            cost = 2 * output.numel() * module.in_features
            first = False
        total += cost * (2 if first else 3)

    hooks = [
        module.register_forward_hook(seen)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    run(model)
    for hook in hooks:
        hook.remove()
    return total


def test_flops_of_convolutions_and_linear_layers_are_those_counted_by_hand():
    spec = task_spec("radiology")
    kind = registry.get("resnet34")
    config = kind.tiny()
    flops = count_flops(lambda: kind(config, spec), Task(spec), TrainConfig(), 64)
    model = kind(config, spec)
    encode = nn.Sequential(model.cxr_encoder, model.cxr_head)
    by_hand = _hand_count(encode, 4, lambda model: model(torch.randn(4, 3, 64, 64))) / 4
    rows = (flops.row, flops.step, flops.squared)
    # The head sees every row, with an image or not.
    head = 3 * 2 * model.cxr_head.weight.numel()
    assert flops.image + (flops.row if flops.row else 0.0) == pytest.approx(by_hand)
    assert rows == pytest.approx((head, 0.0, 0.0)) or flops.row == 0


def test_flops_of_a_recurrent_layer_are_those_counted_by_hand():
    kind = registry.get("lstm")
    config = kind.tiny()
    flops = count_flops(lambda: kind(config, SPEC), Task(SPEC), TrainConfig(), 32)
    model = kind(config, SPEC)
    weights = {name: value.numel() for name, value in model.named_parameters()}
    gates = sum(n for name, n in weights.items() if "layers" in name and "weight" in name)
    # A step multiplies with every weight once, and in the backward pass twice.
    assert flops.step == pytest.approx(3 * 2 * gates, rel=1e-6)
    assert flops.squared == pytest.approx(0.0, abs=1e-6)


def test_attention_is_quadratic_in_the_length():
    kind = registry.get("transformer")
    config = kind.tiny()
    flops = count_flops(lambda: kind(config, SPEC), Task(SPEC), TrainConfig(), 32)
    layers = 1 + config.layers
    # Scores and their sum over the steps: 2 products of T x T x D forward, 4 (or 5) backward.
    assert flops.squared / (2 * layers * config.hidden) in (6, 7)


@pytest.mark.parametrize("value", ["ten", "5", "9-3", "1-2-3", "-1-3"])
def test_a_wrong_span_of_steps_is_refused(value):
    with pytest.raises(ValidationError, match="needs the first and the last step"):
        TrainConfig(profile=value)


def test_the_asked_steps_are_traced(harness, tmp_path):
    job = harness.Job(str(tmp_path), "", strategy="single", train={"profile": "1-2"})
    loop.fit(harness.session(job))
    (written,) = (tmp_path / "traces").iterdir()
    assert written.name == "steps-1-2.json"
    names = {event.get("name") for event in json.loads(written.read_text())["traceEvents"]}
    assert {"step 1", "step 2", "aten::addmm"} <= names
    assert not {"step 0", "step 3"} & names


def test_a_trace_ends_with_its_epoch(harness, tmp_path):
    job = harness.Job(str(tmp_path), "", strategy="single", train={"profile": "2-9"})
    loop.fit(harness.session(job))
    names = sorted(path.name for path in (tmp_path / "traces").iterdir())
    assert names == ["steps-2-2.json", "steps-3-5.json"]


def test_only_known_gpus_have_a_peak():
    h100 = hardware.find("NVIDIA H100 80GB HBM3")
    assert h100 is not None
    assert h100.peak("bf16") == pytest.approx(989e12)
    assert h100.peak("fp32") == pytest.approx(66.9e12)
    assert h100.peak("fp32", tf32=True) == pytest.approx(494e12)
    assert hardware.find("NVIDIA GeForce RTX 9999") is None
    assert hardware.find("A100-40G") is hardware.find("NVIDIA A100-SXM4-80GB")
