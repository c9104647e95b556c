"""The dry step against real ones: parameters, what torch's own allocator reports, every model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from data.errors import InputError
from data.schema import MODALITIES, N_FEATURES, Batch
from data.tasks import TaskSpec
from fusion import registry
from fusion.model import FusionModel, Output
from fusion.planning.dry import Rows, dry_step
from fusion.planning.shapes import SHAPES, Llama, LlamaConfig, parameters, shape
from fusion.tasks import Task
from fusion.training.config import TrainConfig
from fusion.training.objective import MicroBatch, Objective, census
from fusion.training.optim import OptimConfig

SPEC = TaskSpec(name="toy", kind="multilabel", labels=("a", "b", "c"))
TINY_LLAMA = {
    "hidden": 64,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "feedforward": 128,
    "vocabulary": 100,
}


class Perceptron(FusionModel):
    """Three layers on the mean of the series."""

    modalities = ("ehr",)

    def __init__(self, width: int) -> None:
        nn.Module.__init__(self)
        self.layers = nn.Sequential(
            nn.Linear(N_FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.head = nn.Linear(width, len(SPEC.labels))

    def forward(self, batch: Batch) -> Output:
        return Output(self.head(self.layers(batch.ehr.mean(1))))


class Peeking(Perceptron):
    """Reads a value of its input."""

    def forward(self, batch: Batch) -> Output:
        if batch.ehr.sum().item() > 0:
            raise AssertionError
        return super().forward(batch)


def _dry(factory, rows, *, inputs_kept=False, **options):
    train = TrainConfig(**options)
    return dry_step(factory, Task(SPEC), train, OptimConfig(), rows, inputs_kept=inputs_kept)


def _real_batch(rows: Rows) -> Batch:
    count = len(rows.lengths)
    present = {name: torch.zeros(count, dtype=torch.bool) for name in MODALITIES}
    present["ehr"][:] = True
    present["cxr"][: rows.images] = True
    size = rows.image_size
    return Batch(
        ehr=torch.randn(count, max(rows.lengths), N_FEATURES),
        lengths=torch.tensor(rows.lengths),
        cxr=torch.randn(rows.images, 3, size, size),
        cxr_index=torch.arange(rows.images),
        present=present,
        targets=torch.ones(count, len(SPEC.labels)),
        cxr_targets=torch.zeros(rows.images, 14),
        rows=np.arange(count),
    )


def _allocated(model, batch, path, **options) -> int:
    """Most bytes that torch's CPU allocator held at once during a step, above those before it."""
    objective = Objective(model, Task(SPEC), TrainConfig(**options))
    counts, phase = census(batch, model), model.phases[0]
    for _ in range(2):  # the first pass allocates what is kept
        model.zero_grad(set_to_none=True)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            objective(MicroBatch(batch), counts, phase)[0].backward()
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    told = [event["args"] for event in events if event["name"] == "[memory]"]
    before = told[0]["Total Allocated"] - told[0]["Bytes"]
    return max(each["Total Allocated"] for each in told) - before


@pytest.mark.parametrize("width", [64, 512])
def test_a_perceptron_allocates_what_was_reckoned(width, tmp_path):
    rows = Rows((5,) * 256)
    step = _dry(lambda: Perceptron(width), rows)
    model = Perceptron(width)
    real = _allocated(model, _real_batch(rows), tmp_path / "trace.json")
    assert max(step.growing.values()) > 4 * 256 * width * 4, "four activations of that width"
    assert max(step.growing["forward"], step.growing["backward"]) == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(
    ("name", "wider"),
    [
        ("lstm", {"hidden": 128}),
        ("transformer", {}),
        ("medfuse", {"hidden": 128, "fusion_hidden": 128}),
    ],
)
def test_real_models_allocate_what_was_reckoned(name, wider, tmp_path):
    kind = registry.get(name)
    config = kind.Config(**{"name": name, **kind.TINY, **wider})
    rows = Rows((24,) * 32, images=32, image_size=64)
    step = dry_step(
        lambda: kind(config, SPEC), Task(SPEC), TrainConfig(), OptimConfig(), rows, cpu=False
    )
    real = _allocated(kind(config, SPEC), _real_batch(rows), tmp_path / "trace.json")
    assert max(step.growing["forward"], step.growing["backward"]) == pytest.approx(real, rel=0.1)


def test_linear_layers_under_zero3_keep_their_inputs(monkeypatch, tmp_path):
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    config = LlamaConfig(**TINY_LLAMA, lora_rank=4, base="bf16")
    rows, options = Rows((64,) * 4), {"precision": "bf16"}
    plain, kept = (
        _dry(lambda: Llama(config, SPEC), rows, inputs_kept=kept, **options)
        for kept in (False, True)
    )
    assert kept.flops == plain.flops
    batch, trace = _real_batch(rows), tmp_path / "trace.json"
    real = _allocated(Llama(config, SPEC), batch, trace, **options)
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    more = _allocated(Llama(config, SPEC), batch, trace, **options) - real
    reckoned = max(kept.growing.values()) - max(plain.growing.values())
    assert reckoned == pytest.approx(more, rel=0.02)
    assert more > 0.2 * real


@pytest.mark.parametrize("name", registry.names())
def test_every_model_can_be_planned(name):
    kind = registry.get(name)
    step = _dry(lambda: kind(kind.tiny(), SPEC), Rows((4, 7, 3), images=2))
    model = kind(kind.tiny(), SPEC)
    assert step.weights == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert step.gradients <= step.weights
    assert step.working["forward"] > 0
    assert step.flops > 0


def test_a_frozen_encoder_costs_neither_gradients_nor_moments():
    kind = registry.get("medfuse")
    frozen = OptimConfig(group_lr={"cxr_encoder": 0.0})
    rows = Rows((4,) * 2, images=2)
    step = dry_step(lambda: kind(kind.tiny(), SPEC), Task(SPEC), TrainConfig(), frozen, rows)
    model = kind(kind.tiny(), SPEC)
    encoder = sum(parameter.numel() for parameter in model.cxr_encoder.parameters())
    assert step.weights - step.gradients == 4 * encoder
    whole = _dry(lambda: kind(kind.tiny(), SPEC), rows)
    assert step.working["forward"] < whole.working["forward"], "nothing of it is kept"


def test_recomputing_holds_less_and_computes_more():
    config = LlamaConfig(**TINY_LLAMA)
    rows = Rows((64,) * 4)
    plain = _dry(lambda: Llama(config, SPEC), rows)
    again = _dry(lambda: Llama(config, SPEC), rows, recompute=True)
    assert again.working["backward"] < 0.6 * plain.working["backward"]
    assert 1.2 < again.flops / plain.flops < 1.35, "one forward pass in three more"


def test_four_rows_follow_from_one_and_two():
    config = LlamaConfig(**TINY_LLAMA, lora_rank=4, base="bf16")

    def of(rows):
        return _dry(lambda: Llama(config, SPEC), Rows((64,) * rows), precision="bf16")

    direct, extended = of(4), of(1).extended(of(2), 4)
    assert extended.flops == pytest.approx(direct.flops, rel=1e-6)
    assert extended.weights == direct.weights
    assert max(extended.working.values()) == pytest.approx(max(direct.working.values()), rel=0.01)


def test_a_model_that_reads_values_is_refused():
    with pytest.raises(InputError, match="reads values of its tensors"):
        _dry(lambda: Peeking(8), Rows((3, 3)))


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_have_the_published_size(name):
    published = {"llama-3-8b": 8.03e9, "llama-2-13b": 13.02e9}[name]
    described = shape(name)
    head = described.vocabulary * described.hidden
    assert parameters(described) + head == pytest.approx(published, rel=0.002)
    with torch.device("meta"):
        built = Llama(LlamaConfig.of(described), SPEC)
    assert sum(each.numel() for each in built.decoder.parameters()) == parameters(described)


def test_an_unknown_shape_is_told_what_was_meant():
    with pytest.raises(InputError, match=r"--shape: unknown shape 'llama3-8b'.*'llama-3-8b'"):
        shape("llama3-8b")
    with pytest.raises(InputError, match="choose one of llama-3-8b, llama-2-13b"):
        shape("gpt")
