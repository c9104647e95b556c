"""The machines a run is planned for, and what of them it can use."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from data.errors import InputError
from fusion.hardware import GIBI, Gpu

USABLE = 0.92
"""Share of a memory that a run may fill: allocators keep freed pieces they cannot join."""
CONTEXT = GIBI
"""Bytes of a GPU that CUDA, NCCL and cuBLAS take."""
HOST_BASE = 3 * GIBI
"""Bytes of host memory that a worker takes with CUDA's libraries before it trains."""
EFFICIENCY = 0.4
"""Share of the peak that training reaches: an assumption; `mfu` in a run's log measures it."""
PCIE = 25e9
"""Bytes/s between a GPU and the host, one direction."""
HOST_BANDWIDTH = 20e9
"""Bytes/s at which a worker's share of a host updates offloaded weights."""
LOOPBACK = 2e9
"""Bytes/s between workers on CPUs of one node."""

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Machines:
    """Nodes that are all alike.

    Attributes:
        nodes: How many.
        workers: A node's workers: its GPUs, or processes on its CPUs.
        node_memory: Bytes of a node's memory; None if it is not known.
        gpu: What its GPUs are; None trains on CPUs.
        network: Bytes/s between two nodes.
        cpu_flops: FLOP/s of one worker on CPUs.
    """

    nodes: int
    workers: int
    node_memory: int | None
    gpu: Gpu | None = None
    network: float = 12.5e9
    cpu_flops: float = 0.0

    @property
    def world(self) -> int:
        """All workers."""
        return self.nodes * self.workers

    @property
    def bandwidth(self) -> float:
        """Bytes/s at which a worker sends to the others."""
        inside = self.gpu.link if self.gpu is not None else LOOPBACK
        return inside if self.nodes == 1 else min(inside, self.network / self.workers)

    def rate(self, precision: str) -> float:
        """FLOP/s that a worker is assumed to reach."""
        if self.gpu is None:
            return self.cpu_flops
        return EFFICIENCY * self.gpu.peak(precision)


def memory_size(text: str, option: str) -> int:
    """Bytes of a size such as 80GiB, 512G or 1.5 TB (units are powers of two).

    Raises:
        InputError: It is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size <= 0:
        raise InputError(f"{option}: {text!r} is no size of memory; write for example 80GiB")
    return size


def measured_cpu_flops(size: int = 768, seconds: float = 0.3) -> float:
    """FLOP/s of matrix products on one core of this machine, now: a short calibration."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        left = torch.randn(size, size)
        torch.mm(left, left)
        began, runs = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            torch.mm(left, left)
            runs += 1
        return runs * 2 * size**3 / (time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
