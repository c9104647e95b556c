"""`train.profile`: what worker 0 does in a few steps, as a trace for chrome://tracing."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from data.files import atomic_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Tracer:
    """Profiles the steps `first` to `last` of a run, both of them, counted from 0.

    Where a run goes on from a checkpoint among them, those that are left.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None) -> None:
        """Write to `folder`; None profiles nothing."""
        self._folder = folder
        self._steps = steps
        self._profile: Any = None
        self._began = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step of that number."""
        if self._steps is None or not self._steps[0] <= number <= self._steps[1]:
            yield
            return
        if self._profile is None:
            self._profile, self._began = _profiler(), number
            self._profile.start()
        with torch.profiler.record_function(f"step {number}"):
            yield
        if number == self._steps[1]:
            self.close(number)

    def close(self, last: int) -> None:
        """End a trace that has begun and write it; `last` is the last step in it."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._folder / f"steps-{self._began}-{last}.json") as temporary:
            profile.export_chrome_trace(str(temporary))


def _profiler() -> Any:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)
