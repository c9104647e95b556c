"""The run folder: one layout, the same wherever a run ran."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
        """model.safetensors and meta.json of the best epoch."""
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
