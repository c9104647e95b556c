"""Beside a run: is the cluster large enough, how far is it, and what Ctrl-C means."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import InputError
from ray_jobs.progress import Follower, Reporter

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_jobs.config import RunConfig, ScalingConfig
    from ray_jobs.runs import RunFolder

LOOK_EVERY_S = 0.5
COUNT_NODES_EVERY_S = 30.0
NODES_DEADLINE_S = 600.0


class Supervised:
    """A blocking call on a thread of its own, while this one shows progress and hears Ctrl-C.

    Ray's trainer waits without end and takes Ctrl-C as an abort. Here the first Ctrl-C asks the
    workers, by a file in the run's folder, to finish the step and write a checkpoint; the second
    raises at once.
    """

    def __init__(
        self, body: Callable[[], Any], config: RunConfig, folder: RunFolder, stop: Path
    ) -> None:
        self._body = body
        self._stop = stop
        self._scaling = config.scaling
        self._counted = time.monotonic()
        self._short_since: float | None = None
        self._reporter = Reporter(config.name, config.train.trained_epochs)
        self._follower = Follower(folder.metrics)
        self._result: Any = None
        self._error: BaseException | None = None

    def wait(self) -> Any:
        """The call's result.

        Raises:
            InputError: What one worker raised of that kind, or nodes were lost and none came
                back within ten minutes.
            KeyboardInterrupt: On the second Ctrl-C.
        """
        thread = threading.Thread(target=self._run, daemon=True)
        restore = None
        if threading.current_thread() is threading.main_thread():
            restore = signal.signal(signal.SIGINT, self._interrupt)
        try:
            thread.start()
            while thread.is_alive():
                thread.join(LOOK_EVERY_S)
                self._reporter.show(self._follower.new_lines())
                self._count_nodes()
        finally:
            self._reporter.close()
            if restore is not None:
                signal.signal(signal.SIGINT, restore)
        if self._error is not None:
            raise _cause(self._error)
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._body()
        except BaseException as error:  # raised again on the waiting thread
            self._error = error

    def _count_nodes(self) -> None:
        import ray

        now = time.monotonic()
        if now - self._counted < COUNT_NODES_EVERY_S or not ray.is_initialized():
            return
        self._counted = now
        missing = shortage(self._scaling)
        if missing is None:
            self._short_since = None
        elif self._short_since is None:
            self._short_since = now
            self._reporter.say(f"{missing}; waiting for nodes")
        elif now - self._short_since > NODES_DEADLINE_S:
            raise InputError(f"{missing}; the same command goes on once nodes are back")

    def _interrupt(self, number: int, frame: object) -> None:
        if self._stop.exists():
            raise KeyboardInterrupt("stopped at once; the last checkpoint holds")
        self._stop.touch()
        self._reporter.say("finishing this step, then a checkpoint; Ctrl-C again stops at once")


def stop_flag(path: Path, rank: int) -> Callable[[], bool]:
    """Whether `path` exists, looked at by worker 0 at most twice a second."""
    last, answer = 0.0, False

    def requested() -> bool:
        nonlocal last, answer
        if rank == 0 and time.monotonic() - last > LOOK_EVERY_S:
            last, answer = time.monotonic(), path.exists()
        return answer

    return requested


def check_resources(scaling: ScalingConfig) -> None:
    """Refuse to ask for more workers than the cluster can hold: Ray would wait for ever.

    Raises:
        InputError: It is too small.
    """
    missing = shortage(scaling)
    if missing:
        raise InputError(
            f"{missing}; lower scaling.num_workers or scaling.resources_per_worker, or add nodes"
        )


def shortage(scaling: ScalingConfig) -> str | None:
    """What the nodes that are alive lack for a run's workers, busy or not; None if nothing."""
    import ray

    needed = dict(scaling.resources_per_worker)
    if scaling.use_gpu:
        needed.setdefault("GPU", 1.0)
    elif not needed:
        needed["CPU"] = 1.0
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(
        min(int(node.get(name, 0.0) / amount) for name, amount in needed.items() if amount)
        for node in nodes
    )
    if room >= scaling.num_workers:
        return None
    per_worker = ", ".join(f"{amount:g} {name}" for name, amount in needed.items())
    return (
        f"scaling.num_workers is {scaling.num_workers}, each with {per_worker}, but the "
        f"cluster has room for {room}"
    )


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
