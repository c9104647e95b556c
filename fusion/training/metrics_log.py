"""metrics/attempt-N/part-K.jsonl: one JSON object a line; and TensorBoard beside it.

A part is closed with each checkpoint and never reopened, so that storage that cannot append may
hold them. A killed attempt leaves lines beyond its last checkpoint; the next attempt's first line
says from which update it went on, and `read` leaves out what it took back.
"""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path  # noqa: TC003
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fusion.training.progress import Progress

Kind = Literal["train", "speed", "val", "event"]
_ATTEMPT = re.compile(r"attempt-(\d+)")
_PART = re.compile(r"part-(\d+)\.jsonl")


class Log(Protocol):
    """Where the loop writes what happens."""

    def write(self, kind: Kind, progress: Progress, values: Mapping[str, Any]) -> None:
        """One line."""
        ...

    def rotate(self) -> None:
        """Close the current part."""
        ...


class Silent:
    """The log of every worker but the first."""

    def write(self, kind: Kind, progress: Progress, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def rotate(self) -> None:
        """Nothing."""


class MetricsLog:
    """The log of worker 0: the next attempt under a run's metrics folder."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self.attempt = 1 + max((number for number, _ in _numbered(folder, _ATTEMPT)), default=0)
        self._folder = folder / f"attempt-{self.attempt}"
        self._folder.mkdir(parents=True)
        self._part = 1
        self._handle = self._open()
        self._tensorboard = SummaryWriter(
            str(folder / "tensorboard" / f"attempt-{self.attempt}"), write_to_disk=True
        )

    def write(self, kind: Kind, progress: Progress, values: Mapping[str, Any]) -> None:
        """Append {kind, epoch, step, time, values}; `step` counts updates since the run began."""
        line = {
            "kind": kind,
            "epoch": progress.epoch,
            "step": progress.updates,
            "time": time.time(),
            "values": {name: _plain(value) for name, value in values.items()},
        }
        self._handle.write(json.dumps(line) + "\n")
        self._handle.flush()
        for name, value in values.items():
            if kind != "event" and isinstance(value, float):
                self._tensorboard.add_scalar(f"{kind}/{name}", value, progress.updates)

    def rotate(self) -> None:
        """Close the current part and open the next."""
        self._handle.close()
        self._tensorboard.flush()
        self._part += 1
        self._handle = self._open()

    def close(self) -> None:
        """End the attempt's log."""
        self._handle.close()
        self._tensorboard.close()

    def _open(self) -> Any:
        return (self._folder / f"part-{self._part:05d}.jsonl").open("w", encoding="utf-8")


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of the history that survives, in order, over all attempts of a run."""
    history: list[dict[str, Any]] = []
    for line in follow_files(folder):
        values = line["values"]
        if line["kind"] == "event" and values.get("event") == "start":
            history = [old for old in history if old["step"] <= values["updates"]]
        history.append(line)
    return history


def follow_files(folder: Path) -> Iterator[dict[str, Any]]:
    """Every whole line that was ever written, in order."""
    for _, attempt in _numbered(folder, _ATTEMPT):
        for _, part in _numbered(attempt, _PART):
            for text in part.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    continue  # the line a kill cut short
                if isinstance(line, dict):
                    yield line


def _numbered(folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = [(pattern.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in matches if match is not None)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity; they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
