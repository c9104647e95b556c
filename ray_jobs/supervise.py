"""Beside a run: how far is it, does it still move, has it nodes enough, and what Ctrl-C means."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import InputError
from ray_jobs import capacity
from ray_jobs.progress import Follower, Reporter

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_jobs.config import RunConfig
    from ray_jobs.heartbeat import Pulse, Status
    from ray_jobs.runs import RunFolder

LOOK_EVERY_S = 0.5
COUNT_NODES_EVERY_S = 10.0
ABORT_S = 60.0
ASKS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Terminated(KeyboardInterrupt):
    """SIGTERM ended the run, with a checkpoint."""


class Supervised:
    """A blocking call on a thread of its own, while this one watches the run.

    Ray's trainer waits without end and takes Ctrl-C as an abort. Here the first Ctrl-C or SIGTERM
    asks the workers, by a file in the run's folder, to finish the step and write a checkpoint; the
    second raises at once. A node of the run that is about to be taken away asks for the same.

    Attributes:
        asked: What asked the workers for a checkpoint and an end: "Ctrl-C", "SIGTERM", or "drain".
        watch: Told of each new status of the workers.
    """

    def __init__(
        self,
        body: Callable[[], Any],
        config: RunConfig,
        folder: RunFolder,
        stop: Path,
        pulse: Pulse | None = None,
    ) -> None:
        self.asked: str | None = None
        self.watch: Callable[[Status], None] = lambda status: None
        self._body = body
        self._stop = stop
        self._pulse = pulse
        self._scaling = config.scaling
        self._counted = time.monotonic()
        self._short_since: float | None = None
        self._reporter = Reporter(config.name, config.train.trained_epochs)
        self._follower = Follower(folder.metrics)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._result: Any = None
        self._error: BaseException | None = None

    def wait(self) -> Any:
        """The call's result.

        Raises:
            InputError: What one worker raised of that kind; no worker moved for
                `scaling.hang_after_s`; or nodes were lost and none came back within
                `scaling.wait_for_nodes_s`.
            KeyboardInterrupt: On the second Ctrl-C or SIGTERM.
        """
        restore = {}
        if threading.current_thread() is threading.main_thread():
            restore = {number: signal.signal(number, self._interrupt) for number in ASKS}
        try:
            self._thread.start()
            while self._thread.is_alive():
                self._thread.join(LOOK_EVERY_S)
                self._reporter.show(self._follower.new_lines())
                self._look_at_workers()
                self._count_nodes()
        finally:
            self._reporter.close()
            self._abort()
            for number, handler in restore.items():
                signal.signal(number, handler)
        if self._error is not None:
            raise _cause(self._error)
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._body()
        except BaseException as error:  # raised again on the waiting thread
            self._error = error

    def _look_at_workers(self) -> None:
        status = self._pulse.status() if self._pulse is not None else None
        if status is None or not self._thread.is_alive():
            return
        self.watch(status)
        if status.fault is not None:
            raise InputError(f"{status.fault}; the same command goes on once that is mended")
        if status.overdue(self._scaling.hang_after_s):
            raise InputError(
                f"hung: {status.explain()}; the last checkpoint holds and the same command goes "
                "on (scaling.hang_after_s is the deadline)"
            )
        if self.asked is None and (leaving := status.nodes & self._draining):
            self.asked = "drain"
            self._stop.touch()
            self._reporter.say(
                f"{len(leaving)} node(s) of the run are about to be taken away: finishing this "
                "step, then a checkpoint, then on without them"
            )

    def _count_nodes(self) -> None:
        import ray

        now = time.monotonic()
        if now - self._counted < COUNT_NODES_EVERY_S or not ray.is_initialized():
            return
        self._counted = now
        missing = capacity.shortage(self._scaling)
        if missing is None:
            self._short_since = None
        elif self._short_since is None:
            self._short_since = now
            self._reporter.say(f"{missing}; waiting for nodes")
        elif now - self._short_since > self._scaling.wait_for_nodes_s:
            raise InputError(
                f"{missing}; none came in {self._scaling.wait_for_nodes_s:g} s "
                "(scaling.wait_for_nodes_s); the same command goes on once there are enough"
            )

    @property
    def _draining(self) -> set[str]:
        return capacity.draining_nodes()

    def _abort(self) -> None:
        if self._pulse is None or not self._thread.is_alive():
            return
        self._pulse.abort()
        self._thread.join(ABORT_S)

    def _interrupt(self, number: int, frame: object) -> None:
        if self.asked not in (None, "drain"):
            raise KeyboardInterrupt("stopped at once; the last checkpoint holds")
        self.asked = ASKS[signal.Signals(number)]
        self._stop.touch()
        self._reporter.say(
            f"{self.asked}: finishing this step, then a checkpoint; once more stops at once"
        )


def stop_flag(path: Path, rank: int) -> Callable[[], bool]:
    """Whether `path` exists, looked at by worker 0 at most twice a second."""
    last, answer = 0.0, False

    def requested() -> bool:
        nonlocal last, answer
        if rank == 0 and time.monotonic() - last > LOOK_EVERY_S:
            last, answer = time.monotonic(), path.exists()
        return answer

    return requested


def absolute_paths(value: Any) -> Any:
    """A dumped config with its paths absolute: workers run in folders of their own."""
    if isinstance(value, dict):
        return {key: absolute_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [absolute_paths(inner) for inner in value]
    return str(value.absolute()) if isinstance(value, Path) else value


def _cause(error: BaseException) -> BaseException:
    """The InputError behind a failed training, or the failure itself."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, InputError):
                return InputError(str(cause))
            cause = getattr(cause, "cause", None) or cause.__cause__
    return error
