"""A search's folder: runs/<search>/{search.yaml, run.yaml, journal.log, trial-0000/, ...}.

Each trial is an ordinary run's folder in it. What a trial is asked for lies in .asks/, where any
node that sees the folder can read it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from data.errors import InputError
from data.files import write_text
from ray_jobs import config as run_config
from ray_jobs.runs import RunFolder
from ray_jobs.search.space import SearchConfig

if TYPE_CHECKING:
    from pathlib import Path

    from ray_jobs.config import RunConfig


@dataclass(frozen=True)
class SearchFolder:
    """Where a search's files are."""

    path: Path

    @property
    def search(self) -> Path:
        """The search as it was checked."""
        return self.path / "search.yaml"

    @property
    def run(self) -> Path:
        """The run that is searched."""
        return self.path / "run.yaml"

    @property
    def results(self) -> Path:
        """The winner, its test score and what the search cost, as JSON."""
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        """The self-contained report."""
        return self.path / "report.html"

    @property
    def tune(self) -> Path:
        """Ray Tune's own files, of no use once a command has ended."""
        return self.path / ".tune"

    @property
    def asks(self) -> Path:
        """One file for each trial that is asked to end: why."""
        return self.path / ".asks"

    def trial(self, name: str) -> RunFolder:
        """A trial's run."""
        return RunFolder(self.path / name)

    def runs(self) -> list[Path]:
        """The folders of all runs that were begun, by name."""
        return sorted(path.parent for path in self.path.glob("*/config.yaml"))

    def open(self, search: SearchConfig, run: RunConfig) -> None:
        """Make the folder, or come back to it; what an earlier command asked for is void."""
        # Predictions and metrics of patients come here: for this user alone.
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(self.asks, ignore_errors=True)
        self.asks.mkdir(mode=0o700)
        document = search.model_dump(mode="json", by_alias=True)
        write_text(self.search, yaml.safe_dump(document, sort_keys=False))
        run_config.dump(run, self.run)

    def load(self) -> tuple[SearchConfig, RunConfig]:
        """The search and its run.

        Raises:
            InputError: It is no search's folder.
        """
        if not (self.search.is_file() and self.run.is_file()):
            raise InputError(f"{self.path}: no search in it; `rayfuse tune` makes one")
        document: dict[str, Any] = run_config.read_yaml(self.search)
        search = run_config.checked(SearchConfig, document, place=str(self.search))
        return search, run_config.from_dump(run_config.read_yaml(self.run))


def ask(path: Path, why: str) -> None:
    """Ask a trial to end with a checkpoint; the first reason counts."""
    if not path.exists():
        write_text(path, why)


def asked(path: Path) -> str | None:
    """Why a trial is asked to end; None while it is not."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
