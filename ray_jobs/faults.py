"""What `rayfuse chaos` does to a run: signals by process id, a drained node, bad rows, a full disk.

A disturbance reaches the training code through the fields of its Session alone.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from data.schema import Batch, BatchStream
    from fusion.training.loop import Session
    from fusion.training.progress import Progress

ANSWER_S = 60.0
GONE_S = 30.0
SMALL_FILE = 4096


@dataclass(frozen=True)
class Disturbance:
    """Given each worker's session before it trains.

    Attributes:
        pace: Seconds that every step takes at least, so that a fault meets a run under way; those
            of workers that start again are not held up.
        nan_at: Updates after which a batch of NaN comes.
        full_disk_at: Updates after which no file may grow, as on a full disk.
    """

    pace: float = 0.0
    nan_at: int | None = None
    full_disk_at: int | None = None

    def __call__(self, session: Session) -> None:
        """Wrap the session's stream and its beat."""
        if self.nan_at is not None:
            session.train = Poisoned(session.train, session, self.nan_at)
        beat = session.beat
        attempts = list(RunFolder(session.folder).metrics.glob("attempt-*"))
        pace = self.pace if len(attempts) == 1 else 0.0

        def disturbed(stage: Any, progress: Progress) -> None:
            beat(stage, progress)
            if stage == "step":
                time.sleep(pace)
            full = self.full_disk_at is not None and progress.updates >= self.full_disk_at
            if stage == "checkpoint" and full:
                _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE, most))

        session.beat = disturbed


class Poisoned:
    """A stream whose batch after so many updates is NaN."""

    def __init__(self, stream: BatchStream, session: Session, updates: int) -> None:
        self._stream = stream
        self._session = session
        self._updates = updates

    @property
    def steps_per_epoch(self) -> int:
        """As the stream's."""
        return self._stream.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch | None]:
        """As the stream's, but for one batch."""
        for share in self._stream.epoch(epoch, start_step):
            if share is not None and self._session.progress.updates == self._updates:
                yield replace(share, ehr=share.ehr * float("nan"), cxr=share.cxr * float("nan"))
            else:
                yield share


class Striker:
    """An actor on each node: signals processes there, and says whether they are gone."""

    def ready(self) -> bool:
        """Whether it runs."""
        return True

    def signal(self, pid: int, number: int) -> None:
        """Send a signal."""
        os.kill(pid, number)

    def gone(self, pid: int) -> bool:
        """Whether the process has ended, or does so soon.

        A container's first process may not reap what it adopts: a zombie has ended.
        """
        import psutil

        deadline = time.monotonic() + GONE_S
        while time.monotonic() < deadline:
            try:
                if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                    return True
            except psutil.NoSuchProcess:
                return True
            time.sleep(0.05)
        return False

    def stopped(self, pid: int) -> bool:
        """Whether the process is held by SIGSTOP."""
        import psutil

        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)

    def end_node(self) -> None:
        """SIGKILL this node's raylet and all its workers, this one last."""
        import psutil

        own = psutil.Process()
        raylet = next(each for each in own.parents() if each.name() == "raylet")
        family = [each.pid for each in raylet.children(recursive=True) if each.pid != own.pid]
        for pid in [raylet.pid, *family, own.pid]:
            os.kill(pid, signal.SIGKILL)


class Strikers:
    """One striker on each node that is alive, started ahead, so that a strike is at once."""

    def __init__(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.on = {
            node["NodeID"]: ray.remote(Striker)
            .options(
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            )
            .remote()
            for node in ray.nodes()
            if node["Alive"]
        }
        ray.get([striker.ready.remote() for striker in self.on.values()], timeout=10 * ANSWER_S)

    def kill(self, node: str, pid: int) -> bool:
        """SIGKILL a process; whether it is gone."""
        import ray

        ray.get(self.on[node].signal.remote(pid, signal.SIGKILL), timeout=ANSWER_S)
        return self.gone(node, pid)

    def hold(self, node: str, pid: int) -> bool:
        """SIGSTOP a process; whether it is held."""
        import ray

        ray.get(self.on[node].signal.remote(pid, signal.SIGSTOP), timeout=ANSWER_S)
        return bool(ray.get(self.on[node].stopped.remote(pid), timeout=ANSWER_S))

    def gone(self, node: str, pid: int) -> bool:
        """Whether a process ends within a while."""
        import ray

        return bool(ray.get(self.on[node].gone.remote(pid), timeout=ANSWER_S))

    def end_node(self, node: str) -> bool:
        """SIGKILL a node's raylet and workers; whether the cluster has noticed."""
        import ray
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):  # it ends with the node
            ray.get(self.on.pop(node).end_node.remote(), timeout=ANSWER_S)
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            if not any(each["NodeID"] == node and each["Alive"] for each in ray.nodes()):
                return True
            time.sleep(0.5)
        return False

    def close(self) -> None:
        """End the strikers."""
        import ray

        for striker in self.on.values():
            ray.kill(striker)


def drain(node: str, seconds: float) -> None:
    """Announce that a node is taken away in so many seconds, as a cloud's notice does."""
    import ray
    from ray.core.generated import autoscaler_pb2

    deadline_ms = int((time.time() + seconds) * 1000)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, why = client.drain_node(node, reason, "rayfuse chaos", deadline_ms)
    if not accepted:
        raise RuntimeError(f"the cluster refuses to drain node {node[:12]}: {why}")


def truncate(path: Any) -> None:
    """Leave the first half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Any) -> None:
    """Change one byte in the middle of a file; done twice, the file is as it was."""
    before = path.stat()
    with path.open("r+b") as handle:
        handle.seek(before.st_size // 2)
        byte = handle.read(1)
        handle.seek(before.st_size // 2)
        handle.write(bytes([byte[0] ^ 0xFF]))
