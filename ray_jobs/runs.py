"""The run folder: one layout, the same wherever a run ran."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """runs/<name>/{config.yaml, env.json, metrics/, checkpoints/, best/, eval/, report.html}."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, machine and lineage hashes."""
        return self.path / "env.json"

    @property
    def metrics(self) -> Path:
        """attempt-N/part-K.jsonl: one JSON object a line, {kind, epoch, step, time, values}."""
        return self.path / "metrics"

    @property
    def checkpoints(self) -> Path:
        """step-<n>/{COMPLETE, meta.json, rank-<r>/}."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """Weights of the best epoch in parts, and the meta.json that names them."""
        return self.path / "best"

    @property
    def outcome(self) -> Path:
        """Why and when training ended, and the best epoch; there once a run is finished."""
        return self.path / "outcome.json"

    def evaluation(self, split: str) -> Path:
        """eval/<split>/{predictions.parquet, metrics.json}."""
        return self.path / "eval" / split

    @property
    def report(self) -> Path:
        """The self-contained report."""
        return self.path / "report.html"


def listing(folder: Path) -> str:
    """A table of the runs below a folder: state, task, model, preset, best score.

    Raises:
        InputError: There is no such folder, or no run in it.
    """
    import yaml

    found = sorted(path.parent for path in folder.glob("**/config.yaml")) if folder.is_dir() else []
    if not found:
        raise InputError(f"{folder}: no run in it; `rayfuse train RUN.yaml` makes one")
    rows = [("run", "state", "task", "model", "preset", "best")]
    for path in found:
        run = RunFolder(path)
        config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
        rows.append(
            (
                str(path.relative_to(folder)),
                _state(run),
                str(config["task"]),
                str(config["model"]["name"]),
                str(config["preset"]),
                _best(run),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _state(run: RunFolder) -> str:
    if run.outcome.is_file():
        return "finished"
    steps = [
        int(path.parent.name.removeprefix("step-"))
        for path in run.checkpoints.glob("step-*/COMPLETE")
    ]
    return f"unfinished, step {max(steps)}" if steps else "unfinished, no checkpoint"


def _best(run: RunFolder) -> str:
    meta = run.best / "meta.json"
    if not meta.is_file():
        return "-"
    progress = json.loads(meta.read_text(encoding="utf-8"))["progress"]
    score, epoch = progress["best_score"], progress["best_epoch"]
    return "-" if score is None else f"{score:.4f} after epoch {epoch}"
