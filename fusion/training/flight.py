"""A checkpoint on its way to the disk, and what it means that it does not get there."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fusion.training.agreed import AgreedError

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

    from fusion.training.strategy import Strategy

LIST = "files.json"
POLL_S = 0.05


class SaveError(AgreedError):
    """A checkpoint or the best weights could not be written; raised on every worker alike.

    Attributes:
        errno: The system's number, where it was its error.
        filename: The file, where it is known.
    """

    def __init__(self, what: str, fault: Fault) -> None:
        super().__init__(
            f"{what} could not be written by worker {fault.rank}: {fault.text}; the last whole "
            "checkpoint stays, and the same command goes on from it"
        )
        self.errno, self.filename = fault.errno, fault.filename


@dataclass(frozen=True)
class Written:
    """A checkpoint that is complete.

    Attributes:
        updates: Its step.
        held_s: Seconds that training waited for it, so far.
        written_s: Seconds from the step until it was complete.
    """

    updates: int
    held_s: float
    written_s: float


@dataclass(frozen=True)
class Fault:
    """Why a worker could not write; errors themselves need not survive a pickle."""

    rank: int
    text: str
    errno: int | None
    filename: str | None


@dataclass
class Flight:
    """The checkpoint that is being written.

    Attributes:
        name: Of its folder.
        updates: Its step.
        part: This worker's part.
        whole: Worker 0's: all parts, meta.json, COMPLETE.
        abandoned: Set where the lists of the others are no longer waited for.
        began: When, by a clock of this process.
        held_s: Seconds that training waited.
        told: Whether `completed` has given it.
    """

    name: str
    updates: int
    part: Future[None]
    whole: Future[float] | None
    abandoned: threading.Event
    began: float
    held_s: float = 0.0
    told: bool = False


@dataclass
class Attempt:
    """One writing of one checkpoint; its id tells its lists from those that a kill left behind."""

    target: Path
    id: str
    abandoned: threading.Event = field(default_factory=threading.Event)


def listed(path: Path, attempt: Attempt) -> dict[str, str]:
    """The files that a worker lists, once it does so in this attempt."""
    while True:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            found = {}
        if found.get("attempt") == attempt.id:
            files: dict[str, str] = found["files"]
            return files
        if attempt.abandoned.wait(POLL_S):
            raise RuntimeError(f"{path.parent.name} of {attempt.target.name} is waited for no more")


def raise_alike(strategy: Strategy, what: str, error: BaseException | None) -> None:
    """Raise on every worker where one has an error; every worker calls it.

    Raises:
        SaveError: The first worker's.
    """
    fault = None
    if error is not None:
        name = getattr(error, "filename", None)
        text = str(error) or type(error).__name__
        number = getattr(error, "errno", None)
        fault = Fault(strategy.rank, text, number, None if name is None else str(name))
    faults = [each for each in strategy.gather(fault) if each is not None]
    if faults:
        raise SaveError(what, faults[0]) from error


def failure(future: Future[Any] | None) -> BaseException | None:
    """Waits for what a thread of this worker does, if anything; its error."""
    return None if future is None else future.exception()
