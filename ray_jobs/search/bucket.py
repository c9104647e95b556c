"""A search in a bucket: its study is put there as each trial begins and ends, for any machine.

The trials' runs are copied as any run is (ray_jobs/mirror.py), below the search's name.
"""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import InputError
from ray_jobs import lease, storage
from ray_jobs.mirror import Mirror
from ray_jobs.runs import RunFolder
from ray_jobs.search.study import JOURNAL

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ray_jobs.config import RunConfig
    from ray_jobs.search.drive import Source
    from ray_jobs.search.folder import SearchFolder
    from ray_jobs.search.runner import Ending, Job
    from ray_jobs.storage import Store

ASIDE = "journal.aside.log"

logger = logging.getLogger(__name__)


@contextmanager
def kept(run: RunConfig, folder: SearchFolder) -> Iterator[Copy | None]:
    """Lease a search in a bucket and fetch what other machines know of it; None elsewhere.

    The caller holds the folder's lock. At the end the study and its results are put there.

    Raises:
        InputError: Another command drives the search, its name is a run's, or the bucket fails.
    """
    if not storage.in_bucket(run.storage_path):
        yield None
        return
    assert run.storage_path is not None
    place = storage.below(run.storage_path, folder.path.name)
    copy = Copy(place, folder)
    with lease.held(copy.store, folder.path):
        copy.pull()
        try:
            yield copy
        finally:
            copy.push()


class Copy:
    """Copies between a search's folder and its place in a bucket."""

    def __init__(self, place: str, folder: SearchFolder) -> None:
        self.store: Store = storage.open_store(place)
        self._place = place
        self._folder = folder
        self._journal = folder.path / JOURNAL
        self._put: dict[Path, tuple[int, int]] = {}

    def pull(self) -> None:
        """Fetch the study where it is ahead of this folder's, and the runs of which it knows.

        Raises:
            InputError: A run has this name, or the bucket fails.
        """
        held = self.store.names()
        names = {name.split("/")[0] for name in held if name.split("/")[1:] == ["config.yaml"]}
        if "config.yaml" in held:
            raise InputError(f"{self.store.uri} is a run; give the search another --name")
        if JOURNAL in held:
            self._pull_journal()
        if self._folder.results.name in held and not self._folder.results.exists():
            self.store.get(self._folder.results.name, self._folder.results)
        for name in sorted(names):
            local = self._folder.path / name
            if not RunFolder(local).outcome.is_file():
                Mirror(storage.open_store(self._place, name), local).pull_results()

    def push(self) -> None:
        """Put what changed of the study, its configs and its results.

        Raises:
            InputError: The bucket fails.
        """
        folder = self._folder
        # Configs first: a journal says that they are there.
        for path in (folder.search, folder.run, self._journal, folder.results, folder.report):
            if not path.is_file():
                continue
            state = path.stat()
            stamp = state.st_size, state.st_mtime_ns
            if self._put.get(path) != stamp:
                self.store.put(path, path.name)
                self._put[path] = stamp

    def _pull_journal(self) -> None:
        with tempfile.TemporaryDirectory(dir=self._folder.path) as scratch:
            theirs = Path(scratch) / JOURNAL
            self.store.get(JOURNAL, theirs)
            known = theirs.read_bytes()
            mine = self._journal.read_bytes() if self._journal.is_file() else b""
            if mine.startswith(known):
                return
            if not known.startswith(mine):
                # What this folder alone knows of was begun after its last snapshot, or not put.
                os.replace(self._journal, self._folder.path / ASIDE)
                logger.warning(
                    "%s: another machine went on with this search; its study takes the place of "
                    "the one here, which is now %s", self._folder.path, ASIDE,
                )  # fmt: skip
            os.replace(theirs, self._journal)
        logger.info("%s: the study was fetched", self.store.uri)


class Snapshots:
    """A source of jobs whose every beginning and end is in the bucket before anything follows."""

    def __init__(self, source: Source, copy: Copy) -> None:
        self._source = source
        self._copy = copy

    def next(self) -> Job | None:
        """The source's; no other machine proposes the same trial with other values."""
        job = self._source.next()
        self._copy.push()
        return job

    def epoch(self, job: Job, epoch: int, values: Mapping[str, float]) -> str | None:
        """As the source's."""
        return self._source.epoch(job, epoch, values)

    def ended(self, job: Job, ending: Ending) -> None:
        """As the source's."""
        try:
            self._source.ended(job, ending)
        finally:
            self._copy.push()
