"""Closed forms a parameter, what fits, what is recommended, what is named when nothing does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data.errors import InputError
from fusion.hardware import GPUS
from fusion.planning.dry import Step
from fusion.planning.machines import Machines, memory_size
from fusion.planning.memory import Layout, footprint
from fusion.planning.options import (
    Cut,
    key_to_change,
    layouts,
    recommend,
    smallest,
    step_seconds,
    weigh,
)

N = 840_000
BARE = Step(
    parameters=N,
    weights=4 * N,
    buffers=0,
    gradients=4 * N,
    largest_gradient=0,
    inputs=0,
    working={"forward": 0, "backward": 0, "update": 0},
    growing={"forward": 0, "backward": 4 * N, "update": 4 * N},
    largest=0,
    flops=10**12,
)
GIB = 2**30


def _resident(strategy, world, offload="none"):
    parts = dict(footprint(BARE, Layout(strategy, offload, world)).resident)
    parts.pop("engine", None)
    parts.pop("bucket", None)
    return sum(parts.values())


def test_one_worker_holds_sixteen_bytes_a_parameter():
    assert footprint(BARE, Layout("single")).device_peak == 16 * N
    assert footprint(BARE, Layout("ddp", world=4)).device_peak == 16 * N


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_what_stays_on_each_worker(world):
    """Weights 4, own float32 copy 4/N, moments 8/N; stage 3 shards weights and gradients too."""
    assert _resident("ddp", world) == 16 * N
    for stage in ("zero1", "zero2"):
        assert _resident(stage, world) == 4 * N + 12 * N // world
    assert _resident("zero3", world) == 20 * N // world


@pytest.mark.parametrize("world", [2, 4])
def test_what_is_offloaded_is_held_by_the_host(world):
    device = _resident("zero2", world, "optimizer")
    assert device == 4 * N
    host = footprint(BARE, Layout("zero2", "optimizer", world, gpu=True)).host
    assert host["own weights"] + host["moments"] == 12 * N // world
    assert _resident("zero3", world, "all") == 0
    host = footprint(BARE, Layout("zero3", "all", world, gpu=True)).host
    assert host["weights"] == 4 * N // world


def test_stage_one_keeps_all_gradients_and_stage_two_a_bucket_of_them():
    large = replace(BARE, gradients=4 * 10**9, weights=4 * 10**9)
    one = footprint(large, Layout("zero1", world=8, gpu=True)).passes
    two = footprint(large, Layout("zero2", world=8, gpu=True)).passes
    assert sum(one.values()) == 4 * 10**9 + 200_000_000 + 5 * 10**8
    assert sum(two.values()) == 2 * 200_000_000 + 5 * 10**8


def test_accumulated_gradients_are_held_beside_the_activations():
    working = replace(
        BARE,
        working={"forward": 700, "backward": 800, "update": 0},
        growing={"forward": 700, "backward": 900, "update": 0},
    )
    once = footprint(working, Layout("single")).passes
    twice = footprint(working, Layout("single", accumulation=2)).passes
    assert sum(once.values()) == 900
    assert sum(twice.values()) == 800 + 4 * N


def _options(step, machines):
    return [
        weigh(layout, Cut(1, 1, ""), step, machines, "bf16", 0, "")
        for layout in layouts(machines.world, gpu=True, counts=[1, 2])
    ]


EIGHT = Machines(1, 8, 512 * GIB, replace(GPUS["A100"], memory=80 * GIB))
BILLIONS = replace(
    BARE,
    weights=8 * 4 * 10**9,
    gradients=8 * 4 * 10**9,
    growing={"forward": 0, "backward": 8 * 4 * 10**9, "update": 0},
    flops=10**15,
)


def test_eight_billion_parameters_need_sharded_gradients_on_eight_gpus():
    fits = {
        (option.layout.strategy, option.layout.offload): option.lacking is None
        for option in _options(BILLIONS, EIGHT)
    }
    assert not fits["ddp", "none"]
    assert fits["zero2", "none"]
    assert fits["zero3", "none"]
    best = recommend(_options(BILLIONS, EIGHT))
    assert best is not None
    assert (best.layout.strategy, best.layout.offload) == ("zero2", "none")
    assert best.layout.accumulation == 1


def test_the_plainest_of_equals_is_recommended():
    best = recommend(_options(BARE, EIGHT))
    assert best is not None
    assert best.layout.strategy == "ddp"


def test_the_node_memory_is_a_limit_too():
    poor = replace(EIGHT, node_memory=64 * GIB)
    lacking = [option.lacking or "" for option in _options(BILLIONS, poor)]
    assert any(text.startswith("node memory") for text in lacking)


def test_the_first_change_that_is_enough_is_named():
    tight = replace(EIGHT, gpu=replace(GPUS["A100"], memory=5 * GIB), node_memory=None)
    assert recommend(_options(BILLIONS, tight)) is None
    assert "GPU memory" in (smallest(_options(BILLIONS, tight)).lacking or "")
    wider = replace(tight, nodes=64)
    changes = [
        ("train.recompute=true", lambda: _options(BILLIONS, tight)),
        ("scaling.num_workers=512", lambda: _options(BILLIONS, EIGHT)),
        ("scaling.num_workers=1024", lambda: _options(BILLIONS, wider)),
    ]
    assert key_to_change(changes) == "scaling.num_workers=512"
    assert key_to_change(changes[:1]) is None


def test_seconds_are_computing_and_sending():
    machines = Machines(1, 2, None, GPUS["A100"])
    alone = step_seconds(BARE, Layout("single"), machines, "bf16")
    assert alone == pytest.approx(10**12 / (0.4 * 312e12))
    both = step_seconds(BARE, Layout("ddp", world=2), machines, "bf16")
    assert both - alone == pytest.approx(4 * N / 300e9)
    across = replace(machines, nodes=2)
    assert across.bandwidth == pytest.approx(12.5e9 / 2)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * GIB), ("512 G", 512 * GIB), ("1.5TB", 1536 * GIB), ("1048576", 2**20)],
)
def test_sizes_are_read(text, size):
    assert memory_size(text, "--gpu-memory") == size


@pytest.mark.parametrize("text", ["", "80 giga", "-3GiB", "0", "GiB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(InputError, match=r"--gpu-memory: .* is no size of memory.*80GiB"):
        memory_size(text, "--gpu-memory")
