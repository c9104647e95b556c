"""`rayfuse tune`: a search over a run's config, each trial an ordinary run.

The way to a trial's gradient: run -> search.drive -> Tune -> search.runner -> train.run.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.errors import InputError
from data.manifest import Manifest
from data.shards import refuse_unlearnable
from ray_jobs import capacity, cluster, lineage, storage
from ray_jobs.runs import RunFolder
from ray_jobs.search import bucket, confirm, report
from ray_jobs.search.budget import Budget
from ray_jobs.search.drive import Drive
from ray_jobs.search.folder import SearchFolder
from ray_jobs.search.study import JOURNAL, Study
from ray_jobs.search.trials import Trials, warm_points

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ray_jobs.config import RunConfig
    from ray_jobs.search.drive import Executor, Source
    from ray_jobs.search.space import Scalar, SearchConfig

    Go = Callable[[Source], str | None]
    """Drives a source's jobs, and says what ended it early."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A search to run.

    Attributes:
        name: Its folder's, which lies where a run of that name would.
        run: What is searched.
        search: How, with its metrics.
        storage: URL of a database for the study; None keeps a journal in the folder.
        confirm: Train the best trials again with other seeds, and test the winner.
    """

    name: str
    run: RunConfig
    search: SearchConfig
    storage: str | None = None
    confirm: bool = True

    @property
    def folder(self) -> SearchFolder:
        """The search's."""
        return SearchFolder(self.named.folder)

    @property
    def named(self) -> RunConfig:
        """The run under the search's name: where it is kept."""
        return self.run.model_copy(update={"name": self.name})


def run(
    plan: Plan,
    budget: Budget | None = None,
    say: Callable[[str], None] = logger.info,
    executor: Executor | None = None,
) -> Path:
    """Search to the last trial or the budget's end, or go on where an earlier command stood.

    Finished trials are known from the study, running ones go on from their checkpoints. Ctrl-C or
    SIGTERM lets every trial finish its step and write a checkpoint, then raises.

    Args:
        plan: The search.
        budget: Of this command.
        say: Told in a line what happens.
        executor: Runs the trials; default Ray Tune.

    Returns:
        The search's folder.

    Raises:
        InputError: Shards, cluster, storage or folder do not fit, another command drives the
            search, a metric never appears, or the first trials all fail.
        KeyboardInterrupt: After Ctrl-C; after SIGTERM, `supervise.Terminated`.
    """
    budget = budget or Budget()
    manifest = Manifest.load(plan.run.data.shards)
    lineage.check_shards(plan.run, manifest)
    refuse_unlearnable(manifest)
    storage.check(plan.named)
    folder = plan.folder
    if RunFolder(folder.path).config.is_file():
        raise InputError(f"{folder.path} is a run's folder; give the search another --name")
    folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with lineage.locked(RunFolder(folder.path)), bucket.kept(plan.run, folder) as copy:
        _refuse_foreign(plan)
        with _executor(plan, executor) as runs:
            study = _study(plan)
            folder.open(plan.search, plan.run)
            if (why := study.hopeless()) is not None:
                raise InputError(f"{why}\nmend that, and give the search another name")
            say(f"{plan.name}: {study.unfinished} of {study.limit} trial(s) to go")

            def go(source: Source) -> str | None:
                kept = source if copy is None else bucket.Snapshots(source, copy)
                drive = Drive(plan.run, folder, kept, budget, runs, say)
                drive.go()
                return drive.ending

            whole = _search(plan, study, go, say)
            whole = whole and plan.confirm and _retrain(plan, study, go, say)
        if whole:
            _say_results(confirm.conclude(study, plan.run, folder), say)
        say(f"wrote {report.write(study, plan.run, folder)}")
    return folder.path


def _search(plan: Plan, study: Study, go: Go, say: Callable[[str], None]) -> bool:
    """The trials; whether all are over."""
    ending = go(Trials(study, say))
    left = study.unfinished
    if ending is not None:
        say(f"{plan.name}: {ending}; the same command goes on with {left} more")
    return not left


def _retrain(plan: Plan, study: Study, go: Go, say: Callable[[str], None]) -> bool:
    """The best trials and the default with other seeds; whether all are over."""
    if not study.best(1):
        say(f"{plan.name}: no trial was trained to its end, so there is nothing to confirm")
        return False
    source = confirm.Retraining(plan.folder, confirm.jobs(study, plan.run), say)
    if not source.left:
        return True
    say(f"{plan.name}: {source.left} run(s) with other seeds to go")
    ending = go(source)
    if ending is not None:
        say(f"{plan.name}: {ending}; the same command goes on with the other seeds")
    return ending is None


def _say_results(results: dict[str, Any], say: Callable[[str], None]) -> None:
    if results["winner"] is None:
        say("no candidate was trained with every seed; see what failed, and run this again")
        return
    say(f"winner over new seeds: {results['winner']}")
    say(f"the search's best {results['metric']} was {results['optimism']:.4f} too good")
    if results["default_is_better"]:
        say("the default configuration is as good or better over the seeds: keep it")


@contextmanager
def _executor(plan: Plan, given: Executor | None) -> Iterator[Executor]:
    if given is not None:
        yield given
        return
    with cluster.connect():
        from ray_jobs.search.on_tune import OnTune

        capacity.check(plan.run.scaling)
        yield OnTune(plan.run.scaling)


def _study(plan: Plan) -> Study:
    search = plan.search

    def first() -> list[dict[str, Scalar]]:
        return [] if search.warm_start is None else warm_points(search.warm_start, search)

    return Study(search, plan.run, plan.storage or plan.folder.path, first)


def _refuse_foreign(plan: Plan) -> None:
    folder, journal = plan.folder, plan.folder.path / JOURNAL
    if plan.storage is None and folder.search.is_file() and not journal.is_file():
        raise InputError(
            f"{journal} is missing, and with it what was tried; restore it, give the --storage "
            "that the search began with, or another --name"
        )
    if plan.storage is not None and journal.is_file():
        raise InputError(f"{folder.path}: its study is {journal}; leave --storage out")
