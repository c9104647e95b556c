"""`rayfuse runs gc`: what no run needs any more."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data.errors import InputError
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

LOCK = ".lock"


@dataclass(frozen=True)
class Found:
    """Something to remove, or a run left alone.

    Attributes:
        path: A folder or file.
        why: In a few words.
        size: Bytes; None where it stays.
    """

    path: Path
    why: str
    size: int | None


def collect(folder: Path, *, keep: int | None = None, dry_run: bool = False) -> list[Found]:
    """Remove torn and surplus checkpoints, and leftovers, of each run in or below a folder.

    Args:
        folder: A run's, or one of runs.
        keep: Whole checkpoints to keep; default each run's `checkpoint.num_to_keep`. An unfinished
            run keeps its newest whole one in any case, every run its best weights.
        dry_run: Only find.

    Raises:
        InputError: There is no run.
    """
    runs = sorted(path.parent for path in folder.glob("**/config.yaml")) if folder.is_dir() else []
    if not runs:
        raise InputError(f"{folder}: no run in it; give a run's folder, or one of runs")
    found = []
    for path in runs:
        run = RunFolder(path)
        try:
            with _quiet(run, dry_run=dry_run):
                unneeded = list(_unneeded(run, keep))
                for one in () if dry_run else unneeded:
                    _remove(one.path)
        except InputError as error:
            unneeded = [Found(path, f"left alone: {error}", None)]
        found += unneeded
    return found


def report(found: list[Found], *, dry_run: bool) -> str:
    """A line for each, and the sum."""
    lines = [
        f"{one.path}  {one.why}" + ("" if one.size is None else f"  {_amount(one.size)}")
        for one in found
    ]
    sizes = [one.size for one in found if one.size is not None]
    verb = "would remove" if dry_run else "removed"
    return "\n".join([*lines, f"{verb} {len(sizes)} item(s), {_amount(sum(sizes))}"])


def _quiet(run: RunFolder, *, dry_run: bool) -> AbstractContextManager[None]:
    """The run's lock; where nobody ever took it, looking alone leaves none behind."""
    from ray_jobs.lineage import locked

    return nullcontext() if dry_run and not (run.path / LOCK).exists() else locked(run)


def _unneeded(run: RunFolder, keep: int | None) -> Iterator[Found]:
    from fusion.training.checkpoint import COMPLETE, candidates, verify
    from ray_jobs.inference import load_config
    from ray_jobs.train import HIDDEN, STOP

    finished = run.outcome.is_file()
    number = load_config(run.path).checkpoint.num_to_keep if keep is None else keep
    number = number if finished else max(1, number)
    whole = []
    for checkpoint in reversed(candidates(run.checkpoints)):
        fault = verify(checkpoint)
        if fault is None:
            whole.append(checkpoint)
        elif not ((checkpoint / COMPLETE).is_file() and _of_another_version(checkpoint)):
            yield Found(checkpoint, f"torn checkpoint ({fault})", _size(checkpoint))
    for checkpoint in whole[number:]:
        yield Found(checkpoint, f"beyond the newest {number}", _size(checkpoint))
    left = [run.path / HIDDEN, run.path / STOP, *sorted(run.path.rglob(".*.partial"))]
    left += sorted(run.path.glob(".probe-*"))
    for path in left:
        if path.exists():
            yield Found(path, "left by a command that ended", _size(path))


def _of_another_version(checkpoint: Path) -> bool:
    from fusion.training.checkpoint import FORMAT, META

    try:
        meta = json.loads((checkpoint / META).read_text(encoding="utf-8"))
        return bool(meta["format"] != FORMAT)
    except (OSError, ValueError, KeyError):
        return False


def _remove(path: Path) -> None:
    from fusion.training.checkpoint import COMPLETE

    if path.is_file():
        path.unlink()
        return
    # The marker goes first: a removal cut short leaves nothing that looks complete.
    (path / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(path)


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
