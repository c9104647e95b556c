"""A run's folder and its copy in a bucket: pulled before a start, pushed while it trains.

The bucket holds the run in the same layout. A checkpoint's parts go up first, then the metrics
that led to it, its meta.json, and COMPLETE; before a checkpoint is removed, its COMPLETE is.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import urllib.parse
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import InputError
from ray_jobs import lease, storage
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ray_jobs.config import RunConfig
    from ray_jobs.storage import Store

_CHECKPOINT = re.compile(r"checkpoints/(step-\d+)/(.+)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pulled:
    """What came from a bucket.

    Attributes:
        step: The checkpoint's that was fetched, None if the folder needed none.
        skipped: Checkpoint -> why it was passed over.
        files: Other files that were fetched.
    """

    step: int | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()


@contextmanager
def kept(config: RunConfig, folder: RunFolder) -> Iterator[Mirror | None]:
    """Lease a run in a bucket and bring folder and bucket to the same state; None elsewhere.

    The caller holds the folder's lock.

    Raises:
        InputError: Another command trains the run, or the bucket fails.
    """
    mirror = of(config, folder.path)
    if mirror is None:
        yield None
        return
    with lease.held(mirror.store, folder.path):
        mirror.pull()
        mirror.push()
        yield mirror


def of(config: RunConfig, folder: Path) -> Mirror | None:
    """The mirror of a run's folder, None where its storage is no bucket."""
    if not storage.in_bucket(config.storage_path):
        return None
    assert config.storage_path is not None
    return Mirror(storage.open_store(config.storage_path, config.name), folder)


def identify(config: RunConfig) -> None:
    """Fetch whose run a name is in its bucket, where the local folder cannot say."""
    folder = RunFolder(config.folder)
    mirror = of(config, folder.path)
    if mirror is None or folder.config.exists():
        return
    for path in (folder.environment, folder.config):
        with suppress(FileNotFoundError):
            mirror.store.get(path.name, path)
            folder.path.chmod(0o700)


def fetch(uri: str, out: Path) -> Path:
    """Fetch a run by its place in a bucket into a folder of runs; its folder there.

    Raises:
        InputError: It is no bucket, holds no such run, or the run is being trained here.
    """
    from ray_jobs.lineage import locked

    parts = urllib.parse.urlsplit(uri)
    name = parts.path.rstrip("/").rpartition("/")[2]
    if not storage.in_bucket(uri) or not name:
        raise InputError(f"{uri}: name a run in a bucket, e.g. s3://BUCKET/PREFIX/NAME")
    folder = RunFolder(out / name)
    store = storage.open_store(uri)
    if folder.config.name not in store.names():
        raise InputError(f"{store.uri}: no run there; give storage_path/NAME of a run")
    folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(folder):
        Mirror(store, folder.path).pull()
    return folder.path


class Mirror:
    """Copies between one run's folder and a store; `written` and `removed` are a Saver's hooks."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        self.folder = folder
        self._run = RunFolder(folder)
        self._metrics: dict[str, int] | None = None

    def written(self, path: Path) -> None:
        """Push a whole file; before a checkpoint is complete, the metrics that led to it."""
        completes = self._completes(path)
        if completes:
            self._push_metrics()
        self.store.put(path, self._name(path))
        if completes:
            self._prune()

    def removed(self, path: Path) -> None:
        """Remove a folder or file, a checkpoint's marker first."""
        from fusion.training.checkpoint import COMPLETE

        name = self._name(path)
        if path.is_file():
            self.store.remove(name)
            return
        if path.parent == self._run.checkpoints:
            self.store.remove(f"{name}/{COMPLETE}")
        self.store.remove(f"{name}/")

    def pull(self) -> Pulled:
        """Fetch what the bucket has beyond the folder: the newest whole checkpoint, and the rest.

        Where the bucket is ahead by a checkpoint, metrics and best weights of the folder are of a
        start that was gone on from elsewhere: the bucket's take their place.

        Raises:
            InputError: The bucket fails, or the disk is full.
        """
        from fusion.training.checkpoint import newest_complete

        if self._run.outcome.is_file():
            # It is finished here; checkpoints that `runs gc` removed are not wanted back.
            return Pulled()
        held = self.store.names()
        own = newest_complete(self._run.checkpoints)
        step, skipped = self._pull_checkpoint(held, _step(own.path.name) if own.path else -1)
        if step is not None:
            shutil.rmtree(self._run.metrics, ignore_errors=True)
            shutil.rmtree(self._run.best, ignore_errors=True)
        lacking = self._get_results(held)
        if step is not None or lacking:
            self.folder.chmod(0o700)
            what = f"step {step} and " if step is not None else ""
            logger.info("%s: %s%d files fetched", self.store.uri, what, len(lacking))
        return Pulled(step, skipped, lacking)

    def pull_results(self) -> None:
        """Fetch a run to look at: all but its checkpoints.

        One that ended in the bucket has then ended here; one that did not, and that has checkpoints
        here, is left for `pull`.

        Raises:
            InputError: The bucket fails, or the disk is full.
        """
        held = self.store.names()
        ended = self._run.outcome.name in held
        if self._run.outcome.is_file() or (self._run.checkpoints.exists() and not ended):
            return
        if ended:
            shutil.rmtree(self._run.metrics, ignore_errors=True)
            shutil.rmtree(self._run.best, ignore_errors=True)
        if self._get_results(held):
            self.folder.chmod(0o700)

    def _get_results(self, held: Iterable[str]) -> tuple[str, ...]:
        wanted = [name for name in held if self._is_result(name)]
        lacking = [name for name in sorted(wanted, key=_marker_last) if not self._at(name).exists()]
        for name in lacking:
            self._get(name, self._at(name))
        return tuple(lacking)

    def push(self) -> None:
        """Put there what the folder has beyond the bucket: what a lost connection kept back.

        Raises:
            InputError: The bucket fails.
        """
        from fusion.training.checkpoint import newest_complete

        for path in (self._run.config, self._run.environment):
            if path.is_file():
                self.store.put(path, path.name)
        own = newest_complete(self._run.checkpoints).path
        if own is not None and not self._holds(own):
            self.removed(own)
            for path in _in_order(own):
                self.written(path)
        self._push_metrics()
        self._push_best()
        if self._run.outcome.is_file():
            self.store.put(self._run.outcome, self._run.outcome.name)

    def _pull_checkpoint(
        self, held: dict[str, int], newer_than: int
    ) -> tuple[int | None, dict[str, str]]:
        from fusion.training.checkpoint import COMPLETE

        skipped: dict[str, str] = {}
        found = _checkpoints(held)
        for name in sorted(found, key=_step, reverse=True):
            step, parts = _step(name), found[name]
            if step <= newer_than:
                break
            if COMPLETE not in parts:
                fault: str | None = f"no {COMPLETE}: its upload was not finished"
            else:
                fault = self._fetch(name, parts)
            if fault is None:
                return step, skipped
            skipped[name] = fault
            logger.warning("%s: checkpoint %s passed over: %s", self.store.uri, name, fault)
        return None, skipped

    def _fetch(self, name: str, parts: list[str]) -> str | None:
        """Fetch a checkpoint into place if it verifies; else what is wrong with it."""
        from fusion.training.checkpoint import verify

        target = self._run.checkpoints / name
        partial = target.with_name(f".{name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            for part in parts:
                self._get(f"checkpoints/{name}/{part}", partial / part)
            fault = verify(partial)
            if fault is None:
                if target.exists():
                    shutil.rmtree(target)
                os.replace(partial, target)
            return fault
        except FileNotFoundError as error:
            return f"a file is missing: {error.filename or error}"
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _get(self, name: str, target: Path) -> None:
        try:
            self.store.get(name, target)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise InputError(
                f"{target}: cannot be written ({os.strerror(error.errno or 0)}); free space there, "
                "or set runs_dir to another disk"
            ) from None

    def _push_metrics(self) -> None:
        """Segments that grew since they were last put, each whole."""
        if self._metrics is None:
            self._metrics = self.store.names("metrics/")
        for path in sorted(self._run.metrics.rglob("*")):
            name = self._name(path)
            # Taken before the copy: what is added meanwhile is put the next time.
            size = path.stat().st_size
            if path.is_file() and self._metrics.get(name) != size:
                self.store.put(path, name)
                self._metrics[name] = size

    def _push_best(self) -> None:
        from fusion.training.checkpoint import META

        own = self._run.best / META
        if not own.is_file() or self._same(own):
            return
        files = _in_order(self._run.best)
        for path in files:
            self.store.put(path, self._name(path))
        for name in set(self.store.names("best/")) - {self._name(path) for path in files}:
            self.store.remove(name)

    def _same(self, path: Path) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / path.name
            try:
                self.store.get(self._name(path), copy)
            except FileNotFoundError:
                return False
            return copy.read_bytes() == path.read_bytes()

    def _holds(self, checkpoint: Path) -> bool:
        from fusion.training.checkpoint import COMPLETE

        return self._same(checkpoint / COMPLETE)

    def _prune(self) -> None:
        """Remove checkpoints that the folder no longer has, torn ones among them."""
        from fusion.training.checkpoint import COMPLETE

        for name in _checkpoints(self.store.names("checkpoints/")):
            if not (self._run.checkpoints / name).exists():
                self.store.remove(f"checkpoints/{name}/{COMPLETE}")
                self.store.remove(f"checkpoints/{name}/")

    def _completes(self, path: Path) -> bool:
        from fusion.training.checkpoint import COMPLETE

        return path.name == COMPLETE and path.parent.parent == self._run.checkpoints

    def _is_result(self, name: str) -> bool:
        top = name.split("/")[0]
        files = (self._run.config, self._run.environment, self._run.outcome)
        return top in ("metrics", "best") or name in {path.name for path in files}

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _at(self, name: str) -> Path:
        return self.folder / name


def _checkpoints(names: dict[str, int]) -> dict[str, list[str]]:
    """Checkpoint -> the names of its files."""
    found: dict[str, list[str]] = {}
    for name in names:
        if match := _CHECKPOINT.fullmatch(name):
            found.setdefault(match[1], []).append(match[2])
    return found


def _step(checkpoint: str) -> int:
    return int(checkpoint.removeprefix("step-"))


def _in_order(folder: Path) -> list[Path]:
    """Its files, those that say that it is whole last."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(files, key=lambda path: _marker_last(path.relative_to(folder).as_posix()))


def _marker_last(name: str) -> tuple[int, str]:
    """Parts, then meta.json, then COMPLETE; outcome.json after everything."""
    order = ("meta.json", "COMPLETE", "outcome.json")
    last = name.split("/")[-1]
    return (order.index(last) + 1 if last in order else 0, name)
