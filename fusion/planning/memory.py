"""From a step's account to a worker's memory under each strategy: closed forms, bytes.

Weights, gradients and both moments are float32, so a trainable parameter costs 16 bytes on one
worker. On N workers ZeRO-1 shards the moments, ZeRO-2 the gradients, ZeRO-3 the weights too; what
DeepSpeed holds beside them (a float32 copy of each worker's own shard, buckets, gathered weights)
is counted as it was read in its source.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fusion.training import zero

if TYPE_CHECKING:
    from fusion.planning.dry import Step
    from fusion.training.config import Offload, StrategyName

BUCKET = 4 * zero.BUCKET
"""Bytes of gradients that ZeRO reduces at once."""
LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered while they will be used again."""
ENGINE = 40 * 2**20
"""Bytes that DeepSpeed's engine takes beside what is named, as seen on CPUs."""
RUNTIME = 20 * 2**20
"""Bytes of kernels that oneDNN compiles, threads and the like, as seen on CPUs."""
SUBGROUP = 4_000_000_000
"""Bytes of a shard that ZeRO-3 updates at once (1e9 elements)."""


@dataclass(frozen=True)
class Layout:
    """How a run is spread.

    Attributes:
        strategy: Of `scaling.strategy`.
        offload: Of `scaling.offload`.
        world: Workers.
        accumulation: Micro-batches a step.
        gpu: On a GPU, the optimizer updates all parameters in one sweep.
    """

    strategy: StrategyName
    offload: Offload = "none"
    world: int = 1
    accumulation: int = 1
    gpu: bool = False

    @property
    def inputs_kept(self) -> bool:
        """Whether linear layers keep their inputs: the step's account is then another one."""
        return self.strategy == "zero3"


@dataclass(frozen=True)
class Footprint:
    """Bytes that one worker holds, by what they are for.

    Attributes:
        resident: On its device, all the time.
        passes: Beside those, at the worst moment of the forward and backward passes.
        update: Beside those, at the worst moment of the update.
        host: In the host's memory for what is offloaded.
    """

    resident: dict[str, int]
    passes: dict[str, int]
    update: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)

    @property
    def device_peak(self) -> int:
        """Most bytes at once on the device."""
        worst = max(sum(self.passes.values()), sum(self.update.values()))
        return sum(self.resident.values()) + worst

    @property
    def host_peak(self) -> int:
        """Bytes of the host's memory."""
        return sum(self.host.values())

    @property
    def worst(self) -> dict[str, int]:
        """What is held at the worst moment on the device."""
        updating = sum(self.update.values()) > sum(self.passes.values())
        return {**self.resident, **(self.update if updating else self.passes)}


def footprint(step: Step, layout: Layout) -> Footprint:
    """What one worker holds of a step under a layout."""
    if layout.strategy in ("single", "ddp"):
        return _replicated(step, layout)
    return _sharded_weights(step, layout) if layout.strategy == "zero3" else _zero(step, layout)


def _working(step: Step) -> int:
    return max(step.working["forward"], step.working["backward"])


def _update_working(step: Step, layout: Layout) -> int:
    """A sweep over all parameters holds one temporary of each; one by one, two of the largest."""
    return step.gradients if layout.gpu else step.working["update"]


def _replicated(step: Step, layout: Layout) -> Footprint:
    """Everything on every worker; under DDP gradients live in its buckets from the start."""
    whole = step.gradients
    resident = {
        "weights": step.weights,
        "buffers": step.buffers,
        "inputs": step.inputs * layout.accumulation,
        "moments": 2 * whole,
    }
    update = {"gradients": whole, "temporaries": _update_working(step, layout)}
    if layout.strategy == "ddp":
        resident["gradients (buckets)"] = whole
        passes = {"activations": _working(step)}
        del update["gradients"]
    elif layout.accumulation > 1:
        passes = {"activations": _working(step), "gradients": whole}
    else:
        growing = max(step.growing["forward"], step.growing["backward"])
        passes = {"activations and gradients": growing}
    return Footprint(resident, passes, update)


def _zero(step: Step, layout: Layout) -> Footprint:
    """Stages 1 and 2: whole weights, flat; the shards of the rest of one worker in N."""
    shard = -(-step.gradients // layout.world)
    resident = {
        "weights": step.weights,
        "buffers": step.buffers,
        "inputs": step.inputs * layout.accumulation,
        "engine": ENGINE,
    }
    state = {"own weights": shard, "moments": 2 * shard}
    update = {"own gradients": shard, "temporaries": 2 * shard}
    host: dict[str, int] = {}
    if layout.offload == "none":
        resident |= state
    else:
        largest = step.largest_gradient
        host = {**state, "staged weights": shard, "gradients": shard, "staging": largest}
        resident["staging"] = largest
        update = {} if layout.gpu else {"temporaries": 2 * shard}
        if layout.gpu:
            host["temporaries"] = 2 * shard
    first, last = _reduction(step, layout)
    passes = first if sum(first.values()) > sum(last.values()) else last
    return Footprint(resident, passes, update, host)


def _reduction(step: Step, layout: Layout) -> tuple[dict[str, int], dict[str, int]]:
    """Stages 1 and 2: held when the first bucket of gradients is full, and at the end.

    Going backward, gradients come as activations go. A full bucket is held beside the gradients it
    was filled from. On a CPU, memory counts once it is written to, and a worker's own gradients
    replace those they are copied from.
    """
    whole, working = step.gradients, _working(step)
    bucket = min(BUCKET, whole)
    sharded = whole // layout.world if layout.offload == "none" else 0
    late = sharded if layout.gpu else (whole - bucket) * sharded // max(1, whole)
    early = sharded if layout.gpu else 0
    if layout.strategy == "zero1":
        held = whole if layout.accumulation > 1 else 0
        growing = max(step.growing["forward"], step.growing["backward"], working + held)
        first = {"activations and gradients": growing}
        return first, {"gradients": whole, "bucket": bucket, "own gradients": late}
    if layout.accumulation > 1:
        remaining, early = working, sharded
    else:
        remaining = max(working - working * bucket // max(1, whole), working - 2 * bucket)
    first = {
        "activations": remaining,
        "gradients": bucket,
        "bucket": bucket,
        "own gradients": early,
    }
    return first, {"gradients": bucket, "bucket": bucket, "own gradients": late}


def _sharded_weights(step: Step, layout: Layout) -> Footprint:
    """Stage 3: a shard of everything, and the weights that are gathered to be used."""
    world = layout.world
    whole, shard = step.gradients, -(-step.gradients // world)
    held = -(-step.weights // world)
    bucket = min(BUCKET, whole)
    resident = {
        "buffers": step.buffers,
        "inputs": step.inputs * layout.accumulation,
        "bucket": bucket,
        "engine": ENGINE,
    }
    state = {"own weights": shard, "moments": 2 * shard, "own gradients": shard}
    host: dict[str, int] = {}
    if layout.offload == "none":
        resident |= state
    else:
        host |= {**state, "gradients of the update": shard}
    if layout.offload == "all":
        host["weights"] = held
    else:
        resident["weights"] = held
    live = LIVE * step.weights // step.parameters
    gathered = min(step.weights, max(live, 2 * step.largest))
    passes = {"activations": _working(step), "gathered weights": gathered, "gradients": bucket}
    swept = min(SUBGROUP, shard)
    update = {"gradients of the update": swept, "temporaries": 2 * swept}
    if layout.offload != "none":
        update = {} if layout.gpu else {"temporaries": 2 * swept}
        if layout.gpu:
            host["temporaries"] = 2 * swept
    return Footprint(resident, passes, update, host)
