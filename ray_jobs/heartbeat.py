"""Heartbeats: where each worker of a run stands, told by the workers, kept beside the driver.

A worker's `Heart` notes what the loop tells it and sends it from a thread twice a second, so that
no step waits for it. The `Ledger`, an actor on the driver's node, says how long nothing has moved
and which ranks lag: every rank beats at the same points, so the fewest beats are the furthest back.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from data.schema import Batch, BatchStream
    from fusion.training.progress import Progress

PERIOD_S = 0.5
START_S = 600.0
STARTING = ("strategy", "opening", "start")
ANSWER_S = 60.0


@dataclass(frozen=True)
class Beat:
    """Where one worker stands.

    Attributes:
        rank: Of `world` workers.
        world: Workers of the group.
        node: Ray's id of its node.
        host: The node's address.
        pid: Of the worker's process there.
        count: Beats since its group started.
        stage: What it is about to do.
        epoch: Of the step in hand.
        step: Within the epoch.
        updates: Steps done since the run began.
        frame: The innermost Python function of the training thread, file:line function.
    """

    rank: int
    world: int
    node: str
    host: str
    pid: int
    count: int = 0
    stage: str = STARTING[0]
    epoch: int = 0
    step: int = 0
    updates: int = 0
    frame: str = ""

    @property
    def place(self) -> str:
        """In words."""
        return f"epoch {self.epoch}, step {self.step}, stage {self.stage}"


@dataclass(frozen=True)
class Loss:
    """Why the workers before the present ones ended.

    Attributes:
        cause: In words.
        updates: Steps they had done since the run began.
        since: When they last moved, by the ledger's clock.
    """

    cause: str
    updates: int
    since: float


@dataclass(frozen=True)
class Status:
    """What the ledger knows.

    Attributes:
        beats: The newest of each rank of the present group, by rank; none once it is given up.
        unheard: Seconds since each of them was heard of, by rank.
        quiet: Seconds since anything moved: a worker's beat, or Ray's controller.
        fault: What a worker found that a restart cannot mend.
        groups: Groups of workers so far.
    """

    beats: tuple[Beat, ...] = ()
    unheard: dict[int, float] = field(default_factory=dict)
    quiet: float = 0.0
    fault: str | None = None
    groups: int = 0

    @property
    def nodes(self) -> set[str]:
        """The nodes that hold the workers."""
        return {beat.node for beat in self.beats}

    def overdue(self, seconds: float) -> bool:
        """Whether nothing has moved for so long; workers that start may take ten minutes."""
        starting = not self.beats or len(self.beats) < self.beats[0].world
        starting = starting or any(beat.stage in STARTING for beat in self.beats)
        return self.quiet > (max(seconds, START_S) if starting else seconds)

    def lagging(self) -> tuple[list[Beat], str]:
        """The ranks that hold up the others, and how that shows.

        A process that is stopped or cut off is not heard of at all; one that hangs is heard of,
        but has done fewer beats than the others.
        """
        silent = [beat for beat in self.beats if self.unheard[beat.rank] > self.quiet / 2]
        if silent:
            return silent, "not heard of since"
        fewest = min(beat.count for beat in self.beats)
        behind = [beat for beat in self.beats if beat.count == fewest]
        if len(behind) < len(self.beats):
            return behind, "behind the others at"
        return behind, "all at"

    def explain(self) -> str:
        """Who lags, where and since when."""
        since = f"no worker has moved for {self.quiet:.0f} s"
        if not self.beats:
            return f"{since}: none of them has started"
        missing = sorted(set(range(self.beats[0].world)) - {beat.rank for beat in self.beats})
        if missing:
            return f"{since}: rank {', '.join(map(str, missing))} never started"
        ranks, how = self.lagging()
        named = "; ".join(
            f"rank {beat.rank} (pid {beat.pid} on {beat.host}) {how} {beat.place}, in {beat.frame}"
            for beat in ranks
        )
        return f"{since}: {named}"


class Ledger:
    """The newest beat of every rank, and why earlier groups of workers ended.

    One group's ids are known by a common `group` name; beats of earlier groups are ignored.
    """

    def __init__(
        self, cause: str | None = None, updates: int = 0, clock: Callable[[], float] | None = None
    ) -> None:
        """A ledger of a command; `cause` and `updates` tell of the command before it, if any."""
        self._clock = clock or time.monotonic
        now = self._clock()
        self._loss = Loss(cause, updates, now) if cause is not None else None
        self._groups: list[str] = []
        self._beats: dict[int, Beat] = {}
        self._heard: dict[int, float] = {}
        self._moved = now
        self._pending: Loss | None = None
        self._fault: str | None = None
        self._controller: list[Any] = []

    def hear(self, group: str, beat: Beat) -> None:
        """Take note of a worker's beat."""
        if group in self._groups[:-1]:
            return
        now = self._clock()
        if group not in self._groups:
            if self._groups:
                self.lost("the workers were started again")
                self._loss, self._pending = self._pending, None
            self._groups.append(group)
            self._beats, self._heard, self._moved = {}, {}, now
        before = self._beats.get(beat.rank)
        if before is None or beat.count > before.count:
            self._moved = now
        self._beats[beat.rank] = beat
        self._heard[beat.rank] = now

    def lost(self, cause: str) -> None:
        """The present workers are given up; the first cause counts."""
        if self._pending is None and self._groups:
            reached = max((beat.updates for beat in self._beats.values()), default=0)
            self._pending = Loss(cause, reached, self._moved)

    def turned(self) -> None:
        """Ray's controller came into another state."""
        self._moved = self._clock()

    def before(self) -> tuple[str, int] | None:
        """Why the workers before the present ones ended, and the steps they had done."""
        return (self._loss.cause, self._loss.updates) if self._loss else None

    def recovery(self) -> float:
        """Seconds since the workers before the present ones last moved."""
        return self._clock() - self._loss.since if self._loss else 0.0

    def fail(self, fault: str) -> None:
        """A worker found what a restart cannot mend; the first fault counts."""
        self._fault = self._fault or fault

    def status(self) -> Status:
        """All of it."""
        now = self._clock()
        # Workers that are given up say nothing of where the next ones will be.
        present = {} if self._pending else self._beats
        return Status(
            tuple(present[rank] for rank in sorted(present)),
            {rank: now - heard for rank, heard in self._heard.items()},
            now - self._moved,
            self._fault,
            len(self._groups),
        )

    def control(self, controller: list[Any]) -> None:
        """Keep a reference to the handle of Ray's controller, by which a run is ended.

        It comes in a list, so that Ray does not fetch it: the handle alone imports Ray Train.
        """
        self._controller = controller

    def controller(self) -> list[Any]:
        """That reference, if there is one yet."""
        return self._controller


class Pulse:
    """The driver's end of the ledger; nothing here waits, except `abort`."""

    def __init__(self, before: tuple[str, int] | None) -> None:
        """Start the ledger; `before` is why the command before this one ended, and its steps."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
        cause, updates = before or (None, 0)
        self.ledger = ray.remote(Ledger).options(**options).remote(cause, updates)
        self._asked: Any = None

    def status(self) -> Status | None:
        """The answer to the last question, once it is there; then asks again."""
        import ray
        from ray.exceptions import RayActorError

        if self._asked is None:
            self._asked = self.ledger.status.remote()
        ready, _ = ray.wait([self._asked], timeout=0)
        if not ready:
            return None
        asked, self._asked = self._asked, None
        try:
            status: Status = ray.get(asked)
        except RayActorError:
            return None  # Ray starts it again, and the next beats fill it
        return status

    def lost(self, cause: str) -> None:
        """The present workers ended, and others follow."""
        self.ledger.lost.remote(cause)
        self._asked = None  # an answer under way is of the workers that ended

    def abort(self) -> None:
        """End Ray's controller and, with it, its workers."""
        import ray
        from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

        try:
            references = ray.get(self.ledger.controller.remote(), timeout=ANSWER_S)
            controllers = ray.get(references, timeout=ANSWER_S)
        except (GetTimeoutError, ObjectLostError, RayActorError):
            return  # it is gone already; without its driver, Ray ends its workers too
        for controller in controllers:
            try:
                ray.get(controller.abort.remote(), timeout=ANSWER_S)
            except GetTimeoutError:
                ray.kill(controller)
            except RayActorError:
                continue  # what `abort` ends with

    def close(self) -> None:
        """End the ledger."""
        import ray

        ray.kill(self.ledger)


class Heart:
    """A worker's end: notes each beat, and sends the newest from a thread of its own."""

    def __init__(self, ledger: Any, rank: int, world: int) -> None:
        """Start beating to `ledger` from the thread that trains."""
        import ray

        context = ray.get_runtime_context()
        self._ledger = ledger
        self._group = context.get_placement_group_id()
        host = ray.util.get_node_ip_address()
        self._beat = Beat(rank, world, context.get_node_id(), host, os.getpid())
        self._trains = threading.get_ident()
        self._ended = threading.Event()
        self._sender = threading.Thread(target=self._send, name="heart", daemon=True)
        self._sender.start()

    def beat(self, stage: str, progress: Progress | None = None) -> None:
        """Note what the worker is about to do."""
        beat = replace(self._beat, count=self._beat.count + 1, stage=stage)
        if progress is not None:
            beat = replace(beat, epoch=progress.epoch, step=progress.step, updates=progress.updates)
        self._beat = beat

    def before(self) -> tuple[str, int] | None:
        """What the ledger knows of the workers before these."""
        import ray

        found: tuple[str, int] | None = ray.get(self._ledger.before.remote(), timeout=ANSWER_S)
        return found

    def recovery(self) -> float:
        """Seconds since the workers before these last moved."""
        import ray

        return float(ray.get(self._ledger.recovery.remote(), timeout=ANSWER_S))

    def fail(self, fault: str) -> None:
        """Tell the driver of a fault that a restart cannot mend."""
        import ray

        ray.get(self._ledger.fail.remote(fault), timeout=ANSWER_S)

    def stop(self) -> None:
        """Beat no more."""
        self._ended.set()
        self._sender.join()

    def _send(self) -> None:
        import ray

        sent: Any = None
        while not self._ended.wait(PERIOD_S):
            # One message at a time: an unreachable ledger must not gather a queue of them.
            if sent is None or ray.wait([sent], timeout=0)[0]:
                beat = replace(self._beat, frame=innermost(self._trains))
                sent = self._ledger.hear.remote(self._group, beat)


class Watched:
    """A stream that beats before each of its shares; every rank has as many."""

    def __init__(self, stream: BatchStream, beat: Callable[[], None]) -> None:
        self._stream = stream
        self._beat = beat

    @property
    def steps_per_epoch(self) -> int:
        """As the stream's."""
        return self._stream.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch | None]:
        """As the stream's."""
        for share in self._stream.epoch(epoch, start_step):
            self._beat()
            yield share


def innermost(thread: int) -> str:
    """The Python function that a thread of this process is in; names only, no values."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "no Python code"
    code = frame.f_code
    return f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
