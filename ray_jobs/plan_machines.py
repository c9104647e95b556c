"""The machines of `rayfuse plan`: described, of a running cluster, or this one."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from data.errors import InputError
from fusion import hardware
from fusion.planning import machines as m
from fusion.planning.machines import Machines
from fusion.planning.options import gib

if TYPE_CHECKING:
    from ray_jobs.config import RunConfig


def in_words(machines: Machines, precision: str) -> str:
    """The machines in a line, with what is assumed of them."""
    memory = "unknown" if machines.node_memory is None else gib(machines.node_memory)
    if machines.gpu is None:
        return (
            f"machines: {machines.nodes} node(s) with {machines.workers} CPU worker(s) and "
            f"{memory} each; {machines.cpu_flops / 1e9:.0f} GFLOP/s a worker, by a short matrix "
            "product on this machine now"
        )
    return (
        f"machines: {machines.nodes} node(s) with {machines.workers} GPU(s) of "
        f"{gib(machines.gpu.memory)} and {memory} each; {m.EFFICIENCY:.0%} of "
        f"{machines.gpu.peak(precision) / 1e12:.0f} TFLOP/s and "
        f"{machines.bandwidth / 1e9:.1f} GB/s to others assumed"
    )


def local_machine(config: RunConfig | None) -> Machines:
    """This machine, with the run's workers on it."""
    import psutil
    import torch

    workers = config.scaling.most if config is not None else 1
    total = psutil.virtual_memory().total
    if config is not None and config.scaling.use_gpu and torch.cuda.is_available():
        return Machines(1, workers, total, _gpu(torch.cuda.get_device_name(0)))
    return Machines(1, workers, total, cpu_flops=_cpu_flops())


def described(
    *,
    nodes: int,
    gpus: int,
    kind: str,
    gpu_memory: str | None,
    node_memory: str | None,
    network: float,
    workers: int = 1,
) -> Machines:
    """Machines by their description.

    Raises:
        InputError: A size or a kind of GPU is not understood.
    """
    if nodes < 1 or gpus < 0:
        raise InputError("--nodes must be 1 or more, and --gpus 0 or more")
    held = m.memory_size(node_memory, "--node-memory") if node_memory else None
    if not gpus:
        return Machines(nodes, -(-workers // nodes), held, cpu_flops=_cpu_flops())
    gpu = _gpu(kind)
    if gpu_memory:
        gpu = replace(gpu, memory=m.memory_size(gpu_memory, "--gpu-memory"))
    return Machines(nodes, gpus, held, gpu, network * 1e9 / 8)


def live(config: RunConfig, address: str | None) -> Machines:
    """The nodes of a running cluster that the run's workers will fill.

    Raises:
        InputError: It does not answer, or has no room for the workers.
    """
    import ray

    from ray_jobs import capacity, cluster

    with cluster.connect(address):
        capacity.check(config.scaling)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    needed = capacity.per_worker(config.scaling)
    rooms = [
        (min(int(node.get(name, 0) / amount) for name, amount in needed.items()), node)
        for node in nodes
    ]
    used = [(room, node) for room, node in rooms if room]
    workers = min(config.scaling.most, max(room for room, _ in used))
    count = -(-config.scaling.most // workers)
    memory = min(int(node.get("memory", 0)) for _, node in used) or None
    if not needed.get("GPU"):
        return Machines(count, workers, memory, cpu_flops=_cpu_flops())
    kinds = [name for name in used[0][1] if name.startswith("accelerator_type:")]
    return Machines(count, workers, memory, _gpu(kinds[0].split(":")[1] if kinds else ""))


def named_cluster(address: str | None) -> bool:
    """Whether a running cluster is meant."""
    return bool(address or os.environ.get("RAY_ADDRESS"))


def _gpu(kind: str) -> hardware.Gpu:
    gpu = hardware.find(kind)
    if gpu is None:
        raise InputError(
            f"--gpu-kind: nothing is known of {kind!r}; choose one of {', '.join(hardware.GPUS)}, "
            "with --gpu-memory where its memory differs"
        )
    return gpu


def _cpu_flops() -> float:
    return m.EFFICIENCY * m.measured_cpu_flops()


def process_base() -> int:
    """What a process has taken once torch and the models are imported: this one's, now."""
    import psutil

    return int(psutil.Process().memory_info().rss)
