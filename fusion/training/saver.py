"""Writing: step-<n>/{rank-<r>/*.safetensors, meta.json, COMPLETE} and best/, never pickled.

Each worker writes what it owns, from a thread: training waits for a copy in host memory alone. The
workers meet in the folder only. Each lists its files with their hashes in rank-<r>/files.json, and
worker 0 waits for the lists, then writes meta.json (the position, the schedule and every hash) and
COMPLETE (the hash of meta.json), last. No thread calls a collective.
"""

from __future__ import annotations

import shutil
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from data.files import sha256_file, write_json, write_text
from fusion.training.agreed import AgreedError
from fusion.training.checkpoint import (
    COMPLETE,
    FORMAT,
    META,
    WORKER,
    candidates,
    detached,
    parts_name,
    rank_folder,
    switch,
    verify,
    worker_state,
    write_tensors,
)
from fusion.training.flight import (
    LIST,
    Attempt,
    Flight,
    SaveError,
    Written,
    failure,
    listed,
    raise_alike,
)
from fusion.training.strategy import persistent_buffers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future
    from pathlib import Path
    from types import TracebackType

    import torch
    from torch import Tensor

    from fusion.training.checkpoint import Base
    from fusion.training.config import CheckpointConfig
    from fusion.training.optimizers import Schedule
    from fusion.training.progress import Progress
    from fusion.training.strategy import Strategy


class Saver:
    """Writes one worker's part of a run's checkpoints and best weights.

    A context: on leaving it, what is being written is finished if all workers leave it alike
    (normally, or by an AgreedError), else given up.

    Attributes:
        folder: The run's; checkpoints/ and best/ are in it.
        base: Frozen parameters that checkpoints leave to their sources, by prefix of `init_from`.
        referenced: Frozen parameters that checkpoints and best/ leave to what the model's
            constructor reads, by prefix.
        clock: Seconds, from any moment on; of the age of checkpoints.
        on_written: Told on each worker of every file it has written, once it is whole, always from
            one thread, which is not the one that trains. The order is one in which files may be
            copied elsewhere: a checkpoint's or best/'s parts on all workers, then its meta.json,
            then COMPLETE. An error it raises is one of saving.
        on_removed: Told on worker 0 of each folder or file, before it is removed.
    """

    def __init__(self, folder: Path, strategy: Strategy, config: CheckpointConfig) -> None:
        self.folder = folder
        self.strategy = strategy
        self.config = config
        self.base: dict[str, Base] = {}
        self.referenced: dict[str, Base] = {}
        self.clock: Callable[[], float] = time.monotonic
        self.on_written: Callable[[Path], None] = lambda path: None
        self.on_removed: Callable[[Path], None] = lambda path: None
        self._saved_at: float | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._flight: Flight | None = None
        self._completed: list[Written] = []

    @property
    def checkpoints(self) -> Path:
        """The run's checkpoints."""
        return self.folder / "checkpoints"

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.settle()
            elif isinstance(error, AgreedError):
                self._settle_quietly()
        finally:
            if self._flight is not None:
                self._flight.abandoned.set()
            if self._threads is not None:
                self._threads.shutdown(wait=False)
            self._threads, self._flight = None, None

    def start_clock(self) -> None:
        """Count a checkpoint's age from now on."""
        self._saved_at = self.clock()

    def due(self) -> bool:
        """Whether worker 0 finds the last checkpoint too old."""
        minutes = self.config.every_minutes
        if minutes is None or self.strategy.rank or self._saved_at is None:
            return False
        return self.clock() - self._saved_at >= 60 * minutes

    def lacking_space(self, shapes: Mapping[str, torch.Size]) -> str | None:
        """What worker 0 finds wrong with the free space of the run's folder, or None.

        Counted: fp32 weights and two moments for each checkpoint that is kept and for the one being
        written beside them, less the frozen base; the best weights twice; less what the folder
        holds already.
        """
        if self.strategy.rank:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        left_out, elsewhere = self._left_out(), _names(self.referenced)
        sizes = {name: 4 * shape.numel() for name, shape in shapes.items() if name not in elsewhere}
        saved = sum(size for name, size in sizes.items() if name not in left_out)
        keep = self.config.num_to_keep
        needed = 3 * saved * (keep + 1) + 2 * sum(sizes.values())
        held = sum(path.stat().st_size for path in self.folder.rglob("*.safetensors"))
        free = shutil.disk_usage(self.folder).free
        if free + held >= needed:
            return None
        return (
            f"{self.folder}: {free / 1e9:.2f} GB free, but {keep} checkpoints and the best weights "
            f"take up to {needed / 1e9:.2f} GB; free space there, set runs_dir to another disk, or "
            "lower checkpoint.num_to_keep"
        )

    def save(self, progress: Progress, schedule: Schedule, document: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step, or begin to; every worker calls it.

        Args:
            progress: Its updates so far name the checkpoint.
            schedule: Of the rates.
            document: JSON values to keep beside it.

        Raises:
            SaveError: This checkpoint cannot be begun, or the one before it not be finished.
        """
        self.settle()
        began = time.monotonic()
        strategy, threads = self.strategy, self._pool()
        attempt = self._begin(self.checkpoints / f"step-{progress.updates:08d}")
        parts = {
            "weights.safetensors": self._weights(self._left_out()),
            "moments.safetensors": detached(strategy.moments()),
            WORKER: detached(worker_state(strategy).items()),
        }
        part = threads.submit(self._write_part, attempt, parts)
        whole = None
        if strategy.rank == 0:
            meta = {
                **document,
                "progress": progress.dump(),
                "schedule": schedule.dump(),
                "format": FORMAT,
                "world": strategy.world,
                "base": _dumped(self.base),
                "referenced": _dumped(self.referenced),
            }
            whole = threads.submit(self._complete, attempt, meta, part)
        self._flight = Flight(
            attempt.target.name, progress.updates, part, whole, attempt.abandoned, began
        )
        self.start_clock()
        self._flight.held_s = time.monotonic() - began
        if not self.config.asynchronous:
            self.settle()

    def failing(self) -> bool:
        """Whether this worker's share in the checkpoint being written has failed."""
        flight = self._flight
        futures = (flight.part, flight.whole) if flight is not None else ()
        return any(each is not None and each.done() and each.exception() for each in futures)

    def settle(self) -> None:
        """Wait until the checkpoint that is being written is complete; every worker calls it.

        Raises:
            SaveError: It failed on some worker.
        """
        strategy, flight, began = self.strategy, self._flight, time.monotonic()
        if flight is None:
            return
        what = f"checkpoint {flight.name}"
        try:
            raise_alike(strategy, what, failure(flight.part))
            # No part is missing, so worker 0 waits for no worker here, and all for worker 0.
            raise_alike(
                strategy, what, flight.whole.exception() if flight.whole is not None else None
            )
        finally:
            flight.abandoned.set()
            self._flight = None
        flight.held_s += time.monotonic() - began
        self._note(flight)

    def completed(self) -> list[Written]:
        """On worker 0, the checkpoints that have become complete since it was asked last."""
        flight = self._flight
        if flight is not None and flight.whole is not None and flight.whole.done():
            self._note(flight)
        completed, self._completed = self._completed, []
        return completed

    def write_best(
        self, progress: Progress, document: Mapping[str, Any], selected: Literal["best", "last"]
    ) -> None:
        """Write the weights as they are to best/, each worker its own; every worker calls it.

        Raises:
            SaveError: Some worker cannot write; best/ stays as it was.
        """
        self.settle()
        strategy, best = self.strategy, self.folder / "best"
        folder = parts_name(progress.updates, strategy.share(uuid.uuid4().hex))
        name = f"{folder}/{rank_folder(strategy.rank)}.safetensors"
        tensors = self._weights(_names(self.referenced))

        def write() -> str:
            digest = write_tensors(best / name, tensors)
            self.on_written(best / name)
            return digest

        threads = self._pool()
        part = threads.submit(write)
        raise_alike(strategy, "best/", failure(part))
        files = dict(strategy.gather((name, part.result())))
        switched = None
        if strategy.rank == 0:
            about = {"progress": progress.dump(), "selected": selected, "files": files}
            meta = {**document, **about, "world": strategy.world}
            meta["referenced"] = _dumped(self.referenced)
            switched = threads.submit(switch, best, meta, self.on_written, self.on_removed)
        raise_alike(strategy, "best/", failure(switched))

    def _begin(self, target: Path) -> Attempt:
        """An empty folder for a checkpoint, and the id of this attempt to write it."""
        strategy = self.strategy
        fault: BaseException | None = None
        if strategy.rank == 0:
            try:
                self._remove(target)
                target.mkdir(parents=True)
            except Exception as error:  # raised on every worker, below
                fault = error
        raise_alike(strategy, f"checkpoint {target.name}", fault)
        return Attempt(target, strategy.share(uuid.uuid4().hex))

    def _left_out(self) -> frozenset[str]:
        return _names(self.base) | _names(self.referenced)

    def _weights(self, left_out: frozenset[str]) -> dict[str, Tensor]:
        """Copies of the parameters that this worker owns; on worker 0, of its buffers too."""
        buffers = persistent_buffers(self.strategy.model)
        own = detached(self.strategy.weights(left_out | buffers.keys()))
        return own if self.strategy.rank else {**own, **detached(buffers.items())}

    def _write_part(self, attempt: Attempt, parts: dict[str, dict[str, Tensor]]) -> None:
        own = attempt.target / rank_folder(self.strategy.rank)
        files = {}
        for name in list(parts):
            # Popped, so that host memory is given back as it goes.
            files[f"{own.name}/{name}"] = write_tensors(own / name, parts.pop(name))
            self.on_written(own / name)
        write_json(own / LIST, {"attempt": attempt.id, "files": files})

    def _complete(self, attempt: Attempt, meta: dict[str, Any], part: Future[None]) -> float:
        part.result()
        folders = [attempt.target / rank_folder(rank) for rank in range(self.strategy.world)]
        lists = [listed(folder / LIST, attempt) for folder in folders]
        meta["files"] = {name: digest for files in lists for name, digest in files.items()}
        target = attempt.target
        write_json(target / META, meta)
        self.on_written(target / META)
        for folder in folders:
            (folder / LIST).unlink()
        write_text(target / COMPLETE, sha256_file(target / META) + "\n")
        self.on_written(target / COMPLETE)
        self._prune(target)
        return time.monotonic()

    def _note(self, flight: Flight) -> None:
        if flight.told or flight.whole is None or flight.whole.exception() is not None:
            return
        flight.told = True
        written_s = flight.whole.result() - flight.began
        self._completed.append(Written(flight.updates, flight.held_s, written_s))

    def _settle_quietly(self) -> None:
        try:
            self.settle()
        except SaveError:
            return  # another error ends the run already

    def _pool(self) -> ThreadPoolExecutor:
        if self._threads is None:
            # One thread: what is begun first is written first, on every worker.
            self._threads = ThreadPoolExecutor(1, thread_name_prefix="saver")
        return self._threads

    def _prune(self, newest: Path) -> None:
        """Remove all but the newest complete ones; an altered one counts as torn."""
        kept = 1
        for path in reversed(candidates(self.checkpoints)):
            if path == newest:
                continue
            if kept < self.config.num_to_keep and verify(path) is None:
                kept += 1
            else:
                self._remove(path)

    def _remove(self, checkpoint: Path) -> None:
        self.on_removed(checkpoint)
        # The marker goes first: a removal cut short leaves nothing that looks complete.
        (checkpoint / COMPLETE).unlink(missing_ok=True)
        if checkpoint.is_dir():
            shutil.rmtree(checkpoint)


def _names(bases: Mapping[str, Base]) -> frozenset[str]:
    return frozenset(name for base in bases.values() for name in base.names)


def _dumped(bases: Mapping[str, Base]) -> dict[str, Any]:
    return {prefix: base.model_dump(mode="json") for prefix, base in bases.items()}
