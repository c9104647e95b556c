"""Decoding processes of one worker: they read, decode and pack; arrays come back in shared memory.

A process knows no torch, so it starts in a fraction of a second and stays small. Batch number n
goes to process n modulo k, so order costs nothing; each process has two slots of shared memory,
which bounds what is decoded ahead. A process that dies is started again with the work it had.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import traceback
import weakref
from collections import deque
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from data.collate import PackedBatch, Packer
from data.errors import InputError
from data.plan import row_words
from data.reader import ShardReader
from data.schema import N_FEATURES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from data.batches import BatchConfig
    from data.normalise import Normalizer

    Result = TypeVar("Result")

SLOTS = 2
_RESTARTS = 2


class Recipe(NamedTuple):
    """All a process needs to know to pack batches."""

    shards: Path
    cache_dir: Path | None
    config: BatchConfig
    normalizer: Normalizer
    train: bool
    seed: int
    pixels: bool = True

    def packer(self, reader: ShardReader | None = None) -> Packer:
        """The packer this describes, on the given reader or one of its own."""
        return Packer(
            reader or ShardReader(self.shards, self.cache_dir),
            self.config,
            self.normalizer,
            train=self.train,
            seed=self.seed,
            pixels=self.pixels,
        )


class Share(NamedTuple):
    """What to pack: row ids [B], the epoch, and whose images are withheld ([B] bool)."""

    rows: NDArray[np.int64]
    epoch: int
    withheld: NDArray[np.bool_]


class _Reply(NamedTuple):
    """What a process says of a batch it left in a slot."""

    ehr: tuple[int, int]
    images: tuple[int, int]
    lengths: NDArray[np.int64]
    cxr_index: NDArray[np.int64]


class DecodingPool:
    """k processes that pack batches ahead, in order."""

    def __init__(self, recipe: Recipe, processes: int) -> None:
        self._workers = [_Process(recipe) for _ in range(processes)]
        self._run = 0
        self._closed = weakref.finalize(self, _close_all, self._workers)

    def map(
        self, shares: Iterable[Share], finish: Callable[[PackedBatch], Result]
    ) -> Iterator[Result | None]:
        """`finish` of each packed share, in order; None for an empty share.

        The arrays given to `finish` are its own only until it returns.

        Raises:
            InputError: As the packing process raised it.
            RuntimeError: A process died for the third time, or failed otherwise.
        """
        self._run += 1
        run = self._run
        for worker in self._workers:
            worker.drain()
        source = iter(shares)
        order: deque[_Process | None] = deque()
        submitted = self._submit(source, order, 0)
        while order:
            oldest = order.popleft()
            result = None if oldest is None else finish(oldest.receive())
            submitted = self._submit(source, order, submitted)
            yield result
            if run != self._run:
                raise RuntimeError("a newer epoch of this stream was started")

    def _submit(
        self, source: Iterator[Share], order: deque[_Process | None], submitted: int
    ) -> int:
        while (worker := self._workers[submitted % len(self._workers)]).has_free_slot:
            share = next(source, None)
            if share is None:
                break
            if not len(share.rows):
                order.append(None)
                continue
            worker.submit(share)
            order.append(worker)
            submitted += 1
        return submitted

    def close(self) -> None:
        """End the processes."""
        self._closed()


class _Process:
    """One decoding process, its pipe and its slots."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._slots = [_Slot() for _ in range(SLOTS)]
        self._free = deque(range(SLOTS))
        self._pending: deque[tuple[int, Share]] = deque()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._restarts = 0

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free)

    def submit(self, share: Share) -> None:
        slot = self._free.popleft()
        self._pending.append((slot, share))
        if self._pipe is None:
            self._start()
            return
        try:
            self._pipe.send((slot, share))
        except OSError:
            self._revive()

    def receive(self) -> PackedBatch:
        """The oldest pending batch; its slot is free for the next one at once."""
        while True:
            assert self._pipe is not None
            try:
                reply = self._pipe.recv()
                break
            except (EOFError, OSError):
                self._revive()
        slot, share = self._pending.popleft()
        self._free.append(slot)
        if isinstance(reply, InputError):
            raise reply
        if isinstance(reply, str):
            raise RuntimeError(f"a decoding process failed:\n{reply}")
        ehr, grey = self._slots[slot].arrays(reply)
        return PackedBatch(
            ehr=ehr.copy(),
            lengths=reply.lengths,
            grey=grey,
            cxr_index=reply.cxr_index,
            rows=share.rows,
            draws=row_words(self._recipe.seed, share.epoch, share.rows),
        )

    def drain(self) -> None:
        """Forget what an abandoned epoch had asked for."""
        while self._pending:
            try:
                self.receive()
            except (InputError, RuntimeError):
                continue

    def close(self) -> int | None:
        """End the process; gives its exit code, None if there was none."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._process is None:
            return None
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._process = None
        return code

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        handles = [theirs.fileno(), *(slot.handle for slot in self._slots)]
        root = str(Path(__file__).resolve().parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from data.decoding import serve; serve({handles})"],
            pass_fds=handles,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            process_group=0,
        )
        theirs.close()
        self._pipe = Connection(ours.detach())
        # A process that died at once is noticed, and counted, where its answer is awaited.
        with contextlib.suppress(OSError):
            self._pipe.send(self._recipe)
            for item in self._pending:
                self._pipe.send(item)

    def _revive(self) -> None:
        self._restarts += 1
        code = self.close()
        if self._restarts > _RESTARTS:
            raise RuntimeError(
                f"a decoding process died {self._restarts} times, last with code {code}; "
                "is the machine short of memory? Try fewer data.batches.processes"
            )
        self._start()


class _Slot:
    """Memory shared with one process; it grows when a batch needs more."""

    def __init__(self, handle: int | None = None) -> None:
        if handle is None:
            handle = os.memfd_create("rayfuse-batch")
            weakref.finalize(self, os.close, handle)
        self.handle = handle
        self._map: mmap.mmap | None = None

    def arrays(self, reply: _Reply) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Views of the series [B, T, 76] and of the images [P, S, S]."""
        rows, steps = reply.ehr
        count, size = reply.images
        floats = rows * steps * N_FEATURES
        memory = self._mapped(4 * floats + count * size * size)
        ehr = np.frombuffer(memory, np.float32, floats).reshape(rows, steps, N_FEATURES)
        grey = np.frombuffer(memory, np.uint8, count * size * size, offset=4 * floats)
        return ehr, grey.reshape(count, size, size)

    def store(self, packed: PackedBatch) -> _Reply:
        """Leave a batch here; the reply tells the other side where."""
        reply = _Reply(
            (len(packed.ehr), packed.ehr.shape[1]),
            packed.grey.shape[:2],
            packed.lengths,
            packed.cxr_index,
        )
        ehr, grey = self.arrays(reply)
        ehr[:] = packed.ehr
        grey[:] = packed.grey
        return reply

    def _mapped(self, size: int) -> mmap.mmap:
        if self._map is None or len(self._map) < size:
            if os.fstat(self.handle).st_size < size:
                os.ftruncate(self.handle, size)
            self._map = mmap.mmap(self.handle, os.fstat(self.handle).st_size)
        return self._map


def _close_all(workers: list[_Process]) -> None:
    for worker in workers:
        worker.close()


def serve(handles: list[int]) -> None:
    """The body of a decoding process: packs what it is asked for until its pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(handles[0])
    slots = [_Slot(handle) for handle in handles[1:]]
    try:
        recipe: Recipe = pipe.recv()
        packer = None
        while True:
            number, share = pipe.recv()
            try:
                packer = packer or recipe.packer()
                answer: object = slots[number].store(packer.pack(*share))
            except InputError as error:
                answer = error
            except Exception:
                answer = traceback.format_exc()
            pipe.send(answer)
    except (EOFError, OSError):
        return
