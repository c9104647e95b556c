"""The list of runs says what each folder holds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import yaml

from data.errors import InputError
from ray_jobs.runs import RunFolder, listing

if TYPE_CHECKING:
    from pathlib import Path


def _write(run: RunFolder, model: str) -> None:
    run.path.mkdir(parents=True)
    config = {"task": "mortality", "model": {"name": model}, "preset": "code"}
    run.config.write_text(yaml.safe_dump(config), encoding="utf-8")


def test_states_and_scores(tmp_path: Path) -> None:
    finished, resumable, bare = (RunFolder(tmp_path / name) for name in ("a", "b", "c"))
    for run, model in ((finished, "lstm"), (resumable, "drfuse"), (bare, "medfuse")):
        _write(run, model)
    finished.outcome.write_text("{}", encoding="utf-8")
    finished.best.mkdir()
    progress = {"best_score": 0.8125, "best_epoch": 3}
    (finished.best / "meta.json").write_text(json.dumps({"progress": progress}), encoding="utf-8")
    for step, complete in ((20, True), (40, True), (60, False)):
        (resumable.checkpoints / f"step-{step}").mkdir(parents=True)
        if complete:
            (resumable.checkpoints / f"step-{step}" / "COMPLETE").touch()
    lines = listing(tmp_path).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["a", "finished", "mortality", "lstm", "code", "0.8125", "after", "epoch", "3"],
        ["b", "unfinished,", "step", "40", "mortality", "drfuse", "code", "-"],
        ["c", "unfinished,", "no", "checkpoint", "mortality", "medfuse", "code", "-"],
    ]


def test_no_run_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="rayfuse train"):
            listing(folder)
