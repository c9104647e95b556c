"""How fast a run trains and what it waits for: rows, data, memory, FLOPs."""

from __future__ import annotations

import resource
import time
from typing import TYPE_CHECKING, TypeVar

import torch

from fusion import hardware
from fusion.training.flops import Work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from data.schema import Batch
    from fusion.training.flops import Flops
    from fusion.training.strategy import Strategy

T = TypeVar("T")
GIB = 2**30


class Speed:
    """One worker's stopwatch between two lines of the log.

    Validation, checkpoints and the log itself are not timed.
    """

    def __init__(
        self,
        flops: Callable[[int], Flops] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Time from now on.

        Args:
            flops: From an image's size to the model's FLOPs; asked once, on worker 0.
            clock: Seconds, from any moment on.
        """
        self._count, self._clock = flops, clock
        self._flops: Flops | None = None
        self._since = clock()
        self._image_size: int | None = None
        self._clear()

    def waited(self, shares: Iterable[T]) -> Iterator[T]:
        """The same shares; the time until each comes is waited for data."""
        shares = iter(shares)
        while True:
            asked = self._clock()
            try:
                share = next(shares)
            except StopIteration:
                return
            self._since = self._clock()
            self._waiting += self._since - asked
            yield share

    def stepped(self, share: Batch | None) -> None:
        """Take note of a step that has just ended; it began when its share came."""
        self._working += self._clock() - self._since
        self._steps += 1
        if share is None:
            return
        lengths = share.lengths.cpu().double()
        self._work[0] += len(share)
        self._work[1] += float(lengths.sum())
        self._work[2] += float(lengths.square().sum())
        self._work[3] += len(share.cxr)
        self._image_size = int(share.cxr.shape[-1])

    def values(self, strategy: Strategy, precision: str) -> dict[str, float]:
        """The figures since the last call; every worker calls it, and starts anew.

        Returns:
            rows_per_s of all workers; step_s; data_wait, the share of the time for which the
            worker that waited longest waited for data; tflops, of the model on all workers, and
            mfu, their share of the GPUs' peak where it is known; memory_gib and
            memory_reserved_gib, the most on any worker's GPU, or else rss_gib, the most that any
            worker's process ever held.
        """
        own = torch.tensor([*self._work, self._waiting, self._working], dtype=torch.float64)
        mine, steps = _memory(strategy.device), self._steps
        self._clear()
        if not steps:
            return {}
        told = strategy.gather((own.tolist(), mine))
        work = Work(*(sum(figures[place] for figures, _ in told) for place in range(4)))
        spans = [figures[4] + figures[5] for figures, _ in told]
        span = max(spans)
        waits = [figures[4] / both for (figures, _), both in zip(told, spans, strict=True)]
        values = {"rows_per_s": work.rows / span, "step_s": span / steps, "data_wait": max(waits)}
        values |= {name: max(memory[name] for _, memory in told) for name in mine}
        if strategy.rank == 0 and self._count is not None and self._image_size is not None:
            if self._flops is None:
                self._flops = self._count(self._image_size)
            rate = self._flops.of(work) / span
            values["tflops"] = rate / hardware.TERA
            if peak := _peak(strategy.device, precision):
                values["mfu"] = rate / (peak * strategy.world)
        return values

    def _clear(self) -> None:
        self._work = [0.0] * 4
        self._waiting = self._working = 0.0
        self._steps = 0


def _memory(device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        values = {
            "memory_gib": torch.cuda.max_memory_allocated(device) / GIB,
            "memory_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        }
        torch.cuda.reset_peak_memory_stats(device)
        return values
    return {"rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}


def _peak(device: torch.device, precision: str) -> float | None:
    """FLOP/s of a worker's GPU; None where it is not known."""
    if device.type != "cuda":
        return None
    gpu = hardware.find(torch.cuda.get_device_name(device))
    if gpu is None:
        return None
    return gpu.peak(precision, tf32=torch.backends.cuda.matmul.allow_tf32)
