"""The ways to run a step on given machines: what each needs, how long it takes, which to take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusion.planning import machines as m
from fusion.planning.memory import RUNTIME, Footprint, Layout, footprint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fusion.planning.dry import Step
    from fusion.planning.machines import Machines
    from fusion.training.config import Offload, StrategyName


@dataclass(frozen=True)
class Cut:
    """One way to cut a worker's share of a step.

    Attributes:
        count: Micro-batches.
        rows: Of the largest one.
        key: The setting that cuts so.
    """

    count: int
    rows: int
    key: str


@dataclass(frozen=True)
class Option:
    """One way to run.

    Attributes:
        layout: Strategy, offloading, workers, micro-batches.
        cut: How micro-batches come about.
        memory: Of one worker.
        device: Bytes of a worker's device: its GPU's, or its share of the node's memory.
        host: Bytes of a node's memory, all its workers together.
        seconds: Of a step, estimated.
        lacking: What does not fit, in words; None if all does.
        note: What else sets it apart, e.g. "lora 16".
    """

    layout: Layout
    cut: Cut
    memory: Footprint
    device: int
    host: int
    seconds: float
    lacking: str | None
    note: str = ""


def layouts(world: int, *, gpu: bool, counts: Sequence[int]) -> Iterator[Layout]:
    """Every strategy, what it may offload, and each number of micro-batches."""
    plain: StrategyName = "single" if world == 1 else "ddp"
    kinds: list[tuple[StrategyName, Offload]] = [(plain, "none")]
    sharded: tuple[StrategyName, ...] = ("zero1", "zero2")
    offloads: tuple[Offload, ...] = ("none", "optimizer")
    if world > 1:
        kinds += [(stage, offload) for stage in sharded for offload in offloads]
    # ZeRO-3 on one worker shards nothing, but it can offload everything.
    kinds += [("zero3", offload) for offload in (*offloads, "all") if world > 1 or offload == "all"]
    for count in counts:
        for strategy, offload in kinds:
            yield Layout(strategy, offload, world, count, gpu)


def weigh(
    layout: Layout, cut: Cut, step: Step, machines: Machines, precision: str, base: int, note: str
) -> Option:
    """What a layout needs on these machines.

    Args:
        layout: How the run is spread.
        cut: How micro-batches come about.
        step: The account of the largest one.
        machines: Where.
        precision: fp32 or bf16.
        base: Bytes that a worker's process takes before it trains.
        note: Kept with the option.
    """
    memory = footprint(step, layout)
    seconds = step_seconds(step, layout, machines, precision)
    if machines.gpu is None:
        device = memory.device_peak + memory.host_peak + RUNTIME + base
        host = device * machines.workers
    else:
        device = memory.device_peak + m.CONTEXT
        host = (memory.host_peak + base) * machines.workers
    lacking = None
    if machines.gpu is not None and device > m.USABLE * machines.gpu.memory:
        lacking = f"GPU memory {gib(device)} of {gib(m.USABLE * machines.gpu.memory)}"
    elif machines.node_memory is not None and host > m.USABLE * machines.node_memory:
        lacking = f"node memory {gib(host)} of {gib(m.USABLE * machines.node_memory)}"
    return Option(layout, cut, memory, device, host, seconds, lacking, note)


def step_seconds(step: Step, layout: Layout, machines: Machines, precision: str) -> float:
    """Computing, then sending what cannot be hidden: nothing is assumed to overlap."""
    others = (layout.world - 1) / layout.world
    whole, shard = step.gradients, step.gradients / layout.world
    sent = {
        "single": 0.0,
        # A ring sends every byte twice: reduce, then spread.
        "ddp": 2 * others * whole,
        "zero1": 2 * others * whole,
        "zero2": others * whole * (layout.accumulation + 1),
        # Weights are gathered for each forward and each backward pass.
        "zero3": others * layout.accumulation * (2 * step.weights + whole),
    }[layout.strategy]
    seconds = layout.accumulation * step.flops / machines.rate(precision)
    seconds += sent / machines.bandwidth
    if layout.offload != "none":
        # Adam on the host reads gradient, weight and moments, and writes the last three.
        seconds += 7 * shard / m.HOST_BANDWIDTH
        if machines.gpu is not None:
            seconds += 2 * shard / m.PCIE
    if layout.offload == "all" and machines.gpu is not None:
        seconds += 2 * layout.accumulation * step.weights / layout.world / m.PCIE
    return seconds


def recommend(options: Sequence[Option]) -> Option | None:
    """The quickest that fits; of those within 2 %, the plainest (they come in that order)."""
    fitting = [option for option in options if option.lacking is None]
    if not fitting:
        return None
    limit = 1.02 * min(option.seconds for option in fitting)
    return next(option for option in fitting if option.seconds <= limit)


def smallest(options: Sequence[Option]) -> Option:
    """The one that needs least of the GPU, then of the node."""
    return min(options, key=lambda option: (option.device, option.host))


def key_to_change(changes: Sequence[tuple[str, Callable[[], Sequence[Option]]]]) -> str | None:
    """The first single change after which something fits; None if none does."""
    return next((key for key, options in changes if recommend(options()) is not None), None)


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"
