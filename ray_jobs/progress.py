"""A run's progress, read from its metrics: one live line in a terminal, plain lines otherwise."""

from __future__ import annotations

import json
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

PLAIN_EVERY_S = 30.0


class Follower:
    """Reads the lines that were added to a metrics folder since the last look."""

    def __init__(self, folder: Path) -> None:
        """Follow `folder` from its present end."""
        self._folder = folder
        self._read: dict[Path, int] = {}
        self.new_lines()

    def new_lines(self) -> list[dict[str, Any]]:
        """Whole lines written since the last call, in order."""
        lines = []
        for path in sorted(self._folder.glob("attempt-*/part-*.jsonl"), key=_order):
            with path.open("rb") as handle:
                handle.seek(self._read.get(path, 0))
                added = handle.read()
            whole = added[: added.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            lines += [json.loads(line) for line in whole.splitlines()]
        return lines


class Reporter:
    """Shows where a run stands."""

    def __init__(self, name: str, epochs: int, stream: TextIO | None = None) -> None:
        """Report the run `name` of `epochs` epochs to a stream (default: standard error)."""
        self._name = name
        self._epochs = epochs
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._train: dict[str, Any] = {}
        self._read: list[dict[str, Any]] = []
        self._validation = ""
        self._last_plain = time.monotonic()

    def show(self, lines: list[dict[str, Any]]) -> None:
        """Take note of new metrics lines and show what they change."""
        for line in lines:
            values = line["values"]
            if line["kind"] == "train":
                self._train = line
                self._read.append(line)
                self._progress()
            elif line["kind"] == "val":
                self._validated(line)
            elif values.get("event") == "recovered":
                self.say(
                    f"recovered after {values['cause']}: {values['replayed']} step(s) replayed, "
                    f"{values['seconds']:.0f} s"
                )
            elif values.get("event") == "embeddings" and values["computed"]:
                torn = f", {values['damaged']} of them damaged" if values["damaged"] else ""
                self.say(
                    f"outputs of the frozen encoder: {values['computed']} files computed{torn}"
                )
            elif values.get("event") == "start" and values["updates"]:
                self.say(f"goes on from step {values['updates']} on {values['world']} worker(s)")

    def say(self, text: str) -> None:
        """One line that stays."""
        self._clear()
        self._stream.write(f"{self._name}: {text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Leave the terminal on a fresh line."""
        self._clear()

    def _progress(self) -> None:
        line, values = self._train, self._train["values"]
        loss = values.get("loss")
        text = (
            f"epoch {line['epoch'] + 1}/{self._epochs}  step {line['step']}/{values['of']}  "
            f"loss {'not finite' if loss is None else f'{loss:.4f}'}"
        )
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            shown = f"{self._name}: {text}{self._validation}"[:width]
            self._stream.write(f"\r\x1b[2K{shown}")
            self._stream.flush()
        elif time.monotonic() - self._last_plain > PLAIN_EVERY_S:
            self._last_plain = time.monotonic()
            self.say(text)

    def _validated(self, line: dict[str, Any]) -> None:
        values = line["values"]
        metric = next(iter(values))  # selects, so first
        score = f"val {metric} {values[metric]:.4f}"
        if values["best"]:
            self._validation = f"  best {score} (epoch {line['epoch']})"
        loss = self._train.get("values", {}).get("loss")
        trained = f"loss {loss:.4f}  " if loss is not None else ""
        best = "  best so far" if values["best"] else ""
        self.say(f"epoch {line['epoch']}/{self._epochs}  {trained}{score}{best}")
        if line["epoch"] == 1 and (cut := texts_read(self._read)):
            self.say(f"texts: {cut}")
        self._read = []
        self._last_plain = time.monotonic()

    def _clear(self) -> None:
        if self._live:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()


def texts_read(lines: Iterable[dict[str, Any]]) -> str:
    """What of its texts a model read in training, in shares; empty where it reads none.

    An alternating update reads a text once for each of its passes, so the counts are no rows.
    """
    names = ("texts", "notes_cut", "labs_cut", "tokens", "tokens_cut", "empty")
    sums = dict.fromkeys(names, 0.0)
    for line in lines:
        for name in names if line["kind"] == "train" else ():
            sums[name] += line["values"].get(f"text_{name}", 0.0)
    read = sums["texts"]
    if not read + sums["empty"]:
        return ""
    most = max(read, 1.0)
    whole = max(sums["tokens"] + sums["tokens_cut"], 1.0)
    return (
        f"the note cut in {sums['notes_cut'] / most:.0%}, results in {sums['labs_cut'] / most:.0%} "
        f"of them, {sums['tokens_cut'] / whole:.0%} of all tokens by model.max_length; no text in "
        f"{sums['empty'] / (read + sums['empty']):.0%} of rows"
    )


def _order(path: Path) -> tuple[int, str]:
    return int(path.parent.name.removeprefix("attempt-")), path.name
