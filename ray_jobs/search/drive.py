"""Drives jobs through an executor: how many at once, until when, and what Ctrl-C means."""

from __future__ import annotations

import logging
import shutil
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from ray_jobs.search.cost import Meter
from ray_jobs.search.folder import ask
from ray_jobs.search.runner import Ending, Job
from ray_jobs.supervise import ASKS, LOOK_EVERY_S, Terminated, absolute_paths

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ray_jobs.config import RunConfig
    from ray_jobs.search.budget import Budget
    from ray_jobs.search.folder import SearchFolder

logger = logging.getLogger(__name__)

LOOK_AT_COST_EVERY_S = 20.0
SAY_WAITS_AFTER_S = 10.0


class Source(Protocol):
    """Where jobs come from, and who hears of them."""

    def next(self) -> Job | None:
        """The next job; None after the last."""
        ...

    def epoch(self, job: Job, epoch: int, values: Mapping[str, float]) -> str | None:
        """A job's validation values after an epoch; why it should end now, or None.

        Raises:
            InputError: Nothing good can come of going on at all.
        """
        ...

    def ended(self, job: Job, ending: Ending) -> None:
        """A job ended; one that was interrupted is to be gone on with.

        Raises:
            InputError: Nothing good can come of going on at all.
        """
        ...


class Executor(Protocol):
    """What runs the jobs that a director proposes."""

    def lacks(self, running: int, begun: int) -> str | None:
        """Why one more has to wait, while `running` run and the workers of `begun` have started.

        None where it has not to.
        """
        ...

    def run(self, director: Drive, payload: Mapping[str, Any], storage: Path) -> None:
        """Run jobs until the director has none.

        Args:
            director: Proposes, and is told.
            payload: `run`, the searched run's config; `folder`, the search's.
            storage: Folder that may be used; removed at the end.
        """
        ...


class Drive:
    """One command's way through the jobs of a source.

    Attributes:
        ending: Why nothing new is begun, once something ended the way.
    """

    def __init__(
        self,
        run: RunConfig,
        folder: SearchFolder,
        source: Source,
        budget: Budget,
        executor: Executor,
        say: Callable[[str], None] = logger.info,
    ) -> None:
        self.ending: str | None = None
        self._executor = executor
        self._run = run
        self._folder = folder
        self._source = source
        self._budget = budget
        self._say = say
        self._running: dict[str, Job] = {}
        self._begun: set[str] = set()
        self._held: Job | None = None
        self._waits: tuple[float, bool] | None = None
        self._halted = False
        self._signal: signal.Signals | None = None
        self._error: BaseException | None = None
        self._meter = Meter(run.scaling)
        self._cost = (0.0, 0.0)

    def go(self) -> None:
        """To the source's end, or the budget's.

        Raises:
            InputError: What the source or a library found.
            KeyboardInterrupt: After Ctrl-C or SIGTERM, with every trial's checkpoint written; at
                once after the second.
        """
        thread = threading.Thread(target=self._execute, name="search", daemon=True)
        restore = {}
        if threading.current_thread() is threading.main_thread():
            restore = {number: signal.signal(number, self._interrupt) for number in ASKS}
        try:
            thread.start()
            while thread.is_alive():
                thread.join(LOOK_EVERY_S)
                self._look_at_budget()
                self._pass_on()
        finally:
            for number, handler in restore.items():
                signal.signal(number, handler)
            shutil.rmtree(self._folder.tune, ignore_errors=True)
        if self._error is not None:
            raise self._error
        if self._signal is not None:
            kind = Terminated if self._signal == signal.SIGTERM else KeyboardInterrupt
            raise kind(f"{self._folder.path.name}: {self.ending}; the same command goes on")

    # What follows is called on the executor's thread.

    def propose(self) -> Job | bool:
        """The next job, False to wait, True for no more."""
        if self.ending is not None:
            return True
        if self._held is None:
            self._held = self._source.next()
        if self._held is None:
            return True
        lacks = self._executor.lacks(len(self._running), len(self._begun))
        if lacks is not None:
            self._wait(self._held, lacks)
            return False
        job, self._held, self._waits = self._held, None, None
        self._running[job.name] = job
        values = "  ".join(f"{path}={_short(value)}" for path, value in job.values.items())
        self._say(f"{job.name}: {values or 'as configured'}")
        return job

    def told(self, job: Job, kind: str, value: Any) -> None:
        """What a trial tells."""
        try:
            if kind == "begun":
                self._begun.add(job.name)
            elif kind == "epoch":
                why = self._source.epoch(job, value["epoch"], value["values"])
                if why is not None:
                    ask(self._folder.asks / job.name, why)
            elif job.name in self._running:
                self._forget(job)
                self._source.ended(job, Ending(**value))
        except Exception as error:  # InputError, or the study's storage: nothing goes on
            self._stop_for(error)

    def gone(self, job: Job) -> None:
        """A trial's process ended; without a word, it died too often."""
        if job.name not in self._running:
            return
        self.told(job, "ending", {"state": "failed", "reason": "its process died again and again"})

    @property
    def halted(self) -> bool:
        """Whether Tune should end what still runs."""
        return self._halted

    def _forget(self, job: Job) -> None:
        del self._running[job.name]
        self._begun.discard(job.name)

    def _wait(self, job: Job, lacks: str) -> None:
        since, said = self._waits or (time.monotonic(), False)
        if not said and time.monotonic() - since > SAY_WAITS_AFTER_S:
            self._say(f"{job.name} waits for {lacks}")
            said = True
        self._waits = since, said

    def _stop_for(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
        self.ending = self.ending or "the search cannot go on"

    def _execute(self) -> None:
        shutil.rmtree(self._folder.tune, ignore_errors=True)
        payload = {
            "run": absolute_paths(self._run.model_dump()),
            "folder": str(self._folder.path.absolute()),
        }
        try:
            self._executor.run(self, payload, self._folder.tune)
        except BaseException as error:  # raised again on the waiting thread
            self._stop_for(error)

    # And this on the waiting one.

    def _look_at_budget(self) -> None:
        now = time.monotonic()
        if now - self._cost[0] > LOOK_AT_COST_EVERY_S:
            running = {self._folder.path / name for name in list(self._running)}
            self._cost = now, self._meter.gpu_hours(self._folder.runs(), running)
        if self.ending is None and (why := self._budget.used_up(self._cost[1])):
            self.ending = why
            self._say(f"{why}: running trials finish their step and write a checkpoint")
        if self._budget.overdrawn:
            self._halted = True

    def _pass_on(self) -> None:
        if self.ending is not None:
            for name in list(self._running):
                ask(self._folder.asks / name, self.ending)

    def _interrupt(self, number: int, frame: object) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt("stopped at once; the last checkpoints hold")
        self._signal = signal.Signals(number)
        self.ending = self.ending or ASKS[self._signal]
        self._say(
            f"{ASKS[self._signal]}: running trials finish their step and write a checkpoint; "
            "once more stops at once"
        )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
