"""Writing: step-<n>/{rank-<r>/*.safetensors, meta.json, COMPLETE} and best/, never pickled.

Each worker writes what it owns. meta.json holds the position, the schedule and the SHA-256 of
every file; COMPLETE, written last, holds that of meta.json.
"""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Any, Literal

from safetensors.torch import save_file

from data.files import atomic_path, sha256_file, write_json, write_text
from fusion.training.checkpoint import (
    COMPLETE,
    FORMAT,
    META,
    candidates,
    detached,
    random_state,
    write_weights,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

    from fusion.training.config import CheckpointConfig
    from fusion.training.optimizers import Schedule
    from fusion.training.progress import Progress
    from fusion.training.strategy import Strategy


class Saver:
    """Writes one worker's part of a run's checkpoints and best weights.

    Attributes:
        folder: The run's; checkpoints/ and best/ are in it.
        clock: Seconds, from any moment on.
        on_written: Told on each worker of every file it has written, once it is whole. The order
            is one in which files may be copied elsewhere: a checkpoint's or best/'s parts on all
            workers, then its meta.json, then COMPLETE. An error it raises is one of saving.
        on_removed: Told on worker 0 of each folder or file, before it is removed.
    """

    def __init__(self, folder: Path, strategy: Strategy, config: CheckpointConfig) -> None:
        self.folder = folder
        self.strategy = strategy
        self.config = config
        self.clock: Callable[[], float] = time.monotonic
        self.on_written: Callable[[Path], None] = lambda path: None
        self.on_removed: Callable[[Path], None] = lambda path: None
        self._saved_at: float | None = None

    @property
    def checkpoints(self) -> Path:
        """The run's checkpoints."""
        return self.folder / "checkpoints"

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
        written beside them, and the best weights twice, less what the folder holds already.
        """
        if self.strategy.rank:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        weights = 4 * sum(shape.numel() for shape in shapes.values())
        keep = self.config.num_to_keep
        needed = weights * (3 * (keep + 1) + 2)
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
        """Write the checkpoint of a step; every worker calls it, and worker 0 completes it.

        Args:
            progress: Its updates so far name the checkpoint.
            schedule: Of the rates.
            document: JSON values to keep beside it.
        """
        strategy = self.strategy
        target = self.checkpoints / f"step-{progress.updates:08d}"
        strategy.align()
        if strategy.rank == 0:
            self._remove(target)
            target.mkdir(parents=True)
        strategy.share(None)
        own = target / f"rank-{strategy.rank:04d}"
        hashes = {
            f"{own.name}/{name}": self._write(own / name, tensors)
            for name, tensors in {
                "weights.safetensors": dict(strategy.weights()),
                "moments.safetensors": dict(strategy.moments()),
                "random.safetensors": random_state(strategy.device),
            }.items()
        }
        files = {name: digest for part in strategy.gather(hashes) for name, digest in part.items()}
        if strategy.rank == 0:
            meta = {
                **document,
                "progress": progress.dump(),
                "schedule": schedule.dump(),
                "format": FORMAT,
                "world": strategy.world,
                "files": files,
            }
            self._complete(target, meta)
        strategy.share(None)
        self.start_clock()

    def write_best(
        self, progress: Progress, document: Mapping[str, Any], selected: Literal["best", "last"]
    ) -> None:
        """Write the weights as they are to best/; every worker calls it."""
        self.strategy.align()
        if self.strategy.rank == 0:
            meta = {**document, "progress": progress.dump(), "selected": selected}
            for path in write_weights(self.folder / "best", self.strategy.model, meta):
                self.on_written(path)
        self.strategy.share(None)

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file(detached(tensors), temporary)
        self.on_written(path)
        return sha256_file(path)

    def _complete(self, target: Path, meta: dict[str, Any]) -> None:
        write_json(target / META, meta)
        self.on_written(target / META)
        write_text(target / COMPLETE, sha256_file(target / META) + "\n")
        self.on_written(target / COMPLETE)
        self._prune(target)

    def _prune(self, newest: Path) -> None:
        """Remove torn checkpoints and all but the newest complete ones."""
        others = [path for path in reversed(candidates(self.checkpoints)) if path != newest]
        complete = [path for path in others if (path / COMPLETE).is_file()]
        kept = complete[: self.config.num_to_keep - 1]
        for path in others:
            if path not in kept:
                self._remove(path)

    def _remove(self, checkpoint: Path) -> None:
        self.on_removed(checkpoint)
        # The marker goes first: a removal cut short leaves nothing that looks complete.
        (checkpoint / COMPLETE).unlink(missing_ok=True)
        if checkpoint.is_dir():
            shutil.rmtree(checkpoint)
