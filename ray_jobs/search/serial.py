"""An executor without Ray: one job after the other, in this process."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ray_jobs.search.drive import Drive
    from ray_jobs.search.runner import Ending, Job

WAIT_S = 0.1


class Serial:
    """Runs each job by a function, e.g. a cheap one that stands for training."""

    def __init__(self, body: Callable[[Job, Callable[[str, Any], None]], Ending]) -> None:
        """Run jobs by `body`, given the job and what it may tell: see `runner.run_job`."""
        self._body = body

    def lacks(self, running: int, begun: int) -> str | None:
        """One at a time."""
        return "the trial before it" if running else None

    def run(self, director: Drive, payload: Mapping[str, Any], storage: Path) -> None:
        """Run what the director proposes until it has nothing more."""
        while (job := director.propose()) is not True:
            if job is False:
                time.sleep(WAIT_S)
                continue

            def tell(kind: str, value: Any, job: Job = job) -> None:
                director.told(job, kind, value)

            ending = self._body(job, tell)
            director.told(job, "ending", asdict(ending))
            director.gone(job)
