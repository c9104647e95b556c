"""How long a search may go on: by the clock, and by the GPU-hours that its trials have used."""

from __future__ import annotations

import datetime
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

RESERVE_S = 120.0
RESERVE_SHARE = 0.1


@dataclass
class Budget:
    """What one command may use.

    Attributes:
        seconds: Of wall clock, from now on.
        gpu_hours: Of all trials of the search, by earlier commands too.
        clock: Seconds, monotonic.
    """

    seconds: float | None = None
    gpu_hours: float | None = None
    clock: Callable[[], float] = time.monotonic
    _start: float = field(init=False)

    def __post_init__(self) -> None:
        self._start = self.clock()

    @property
    def reserve(self) -> float:
        """Seconds kept for checkpoints and the report: a tenth, at most two minutes."""
        return min(RESERVE_S, RESERVE_SHARE * (self.seconds or 0.0))

    def used_up(self, gpu_hours: float) -> str | None:
        """Which budget is used up but for the reserve; None while none is."""
        if self.seconds is not None and self._elapsed >= self.seconds - self.reserve:
            return "the time is used up"
        if self.gpu_hours is not None and gpu_hours >= self.gpu_hours:
            return f"{self.gpu_hours:g} GPU-hours are used up"
        return None

    @property
    def overdrawn(self) -> bool:
        """Whether half of the reserve is gone too."""
        return self.seconds is not None and self._elapsed >= self.seconds - self.reserve / 2

    @property
    def _elapsed(self) -> float:
        return self.clock() - self._start


def seconds_until(text: str, now: datetime.datetime) -> float:
    """Seconds from `now` to the next time that a clock shows `text`, HH:MM.

    Raises:
        InputError: It is no time of day.
    """
    found = re.fullmatch(r"(\d{1,2}):(\d{2})", text)
    if found is None or int(found[1]) > 23 or int(found[2]) > 59:
        raise InputError(f"--until {text}: write a time of day, e.g. 06:00")
    then = now.replace(hour=int(found[1]), minute=int(found[2]), second=0, microsecond=0)
    if then <= now:
        then += datetime.timedelta(days=1)
    return (then - now).total_seconds()


def budget(
    hours: float | None, gpu_hours: float | None, until: str | None, *, gpus: float
) -> Budget:
    """The budget of a command's options; `gpus` is what one worker holds.

    Raises:
        InputError: A number is not above 0, `until` is no time of day, or GPU-hours are given
            where trials use no GPU.
    """
    for name, value in (("--hours", hours), ("--gpu-hours", gpu_hours)):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{name} {value:g}: give a number above 0")
    if gpu_hours is not None and not gpus:
        raise InputError("--gpu-hours: the run uses no GPU (scaling.use_gpu); use --hours")
    limits = [] if hours is None else [3600 * hours]
    if until is not None:
        limits.append(seconds_until(until, datetime.datetime.now().astimezone()))
    return Budget(min(limits, default=None), gpu_hours)
