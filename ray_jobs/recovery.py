"""What a run lost and how it went on: one line in its metrics, and so in the driver's log."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from data.files import write_json
from fusion.training import metrics_log

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fusion.training.metrics_log import MetricsLog
    from fusion.training.progress import Progress
    from ray_jobs.heartbeat import Heart
    from ray_jobs.runs import RunFolder

NOTE = ".stopped.json"


@contextmanager
def noted(folder: RunFolder) -> Iterator[None]:
    """Leave a note of why a command ended before the run did; without one, it was killed."""
    note = folder.path / NOTE
    note.unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        cause = str(error).removeprefix(f"{folder.path.name}: ") or type(error).__name__
        write_json(note, {"cause": cause, "time": time.time()})
        raise


def before(folder: RunFolder) -> tuple[str, int] | None:
    """Why the last command of a run ended, and the steps it had logged; None on a first start."""
    lines = metrics_log.read(folder.metrics)
    if not lines:
        return None
    note = folder.path / NOTE
    if note.is_file():
        cause = json.loads(note.read_text(encoding="utf-8"))["cause"]
    else:
        cause = "the command was killed"
    return cause, lines[-1]["step"]


class Recovery:
    """Worker 0's part: once the first step after a loss is done, writes what it took."""

    def __init__(self, heart: Heart, log: MetricsLog, folder: RunFolder) -> None:
        """Ask the ledger what was lost."""
        self._heart = heart
        self._log = log
        self._lost = heart.before()
        if self._lost is not None:
            cause, updates = self._lost
            logged = before(folder)
            self._lost = cause, max(updates, logged[1] if logged else 0)
        self._from: int | None = None

    def beat(self, progress: Progress) -> None:
        """Told of every beat of the loop."""
        if self._lost is None:
            return
        if self._from is None:
            self._from = progress.updates
        elif progress.updates > self._from:
            cause, updates = self._lost
            self._lost = None
            event = {
                "event": "recovered",
                "cause": cause,
                "attempt": self._log.attempt,
                "replayed": max(0, updates - self._from),
                "seconds": round(self._heart.recovery(), 2),
            }
            self._log.write("event", progress, event)
