"""What trials cost, from their own metrics: known of killed commands too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusion.training import metrics_log
from ray_jobs import capacity

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator
    from pathlib import Path

    from ray_jobs.config import ScalingConfig


def worker_hours(metrics: Path) -> float:
    """Hours that a run's workers trained, summed over workers and starts; lost steps count.

    From the first to the last line of each start: what starting takes is not in it.
    """
    seconds = 0.0
    for lines in _starts(metrics_log.follow_files(metrics)):
        world = int(lines[0]["values"].get("world", 1))
        seconds += world * (lines[-1]["time"] - lines[0]["time"])
    return seconds / 3600


def gpus_per_worker(scaling: ScalingConfig) -> float:
    """GPUs that one worker holds."""
    return capacity.per_worker(scaling).get("GPU", 0.0)


class Meter:
    """The hours of many runs; those that are over are read once."""

    def __init__(self, scaling: ScalingConfig) -> None:
        self._gpus = gpus_per_worker(scaling)
        self._known: dict[Path, float] = {}

    def gpu_hours(self, folders: Iterable[Path], running: Container[Path]) -> float:
        """Of runs' folders, some of which still run."""
        if not self._gpus:
            return 0.0
        hours = 0.0
        for folder in folders:
            if folder in running:
                self._known.pop(folder, None)
                hours += worker_hours(folder / "metrics")
                continue
            if folder not in self._known:
                self._known[folder] = worker_hours(folder / "metrics")
            hours += self._known[folder]
        return self._gpus * hours


def _starts(lines: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    current: list[dict[str, Any]] = []
    for line in lines:
        if line["kind"] == "event" and line["values"].get("event") == "start":
            if current:
                yield current
            current = []
        current.append(line)
    if current:
        yield current
