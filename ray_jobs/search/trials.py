"""The search's own jobs: what the study proposes, pruned and scored as the search says."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from data.errors import InputError
from ray_jobs.search.folder import SearchFolder
from ray_jobs.search.runner import Ending, Job
from ray_jobs.search.study import JOURNAL, Study

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ray_jobs.search.space import Scalar, SearchConfig

PRUNED = "pruned"


def trial_name(number: int) -> str:
    """The folder of a trial within its search's."""
    return f"trial-{number:04d}"


class Trials:
    """A study as a source of jobs."""

    def __init__(self, study: Study, say: Callable[[str], None]) -> None:
        self._study = study
        self._say = say
        self._pruned: set[int] = set()

    def next(self) -> Job | None:
        """What the study proposes next."""
        proposal = self._study.propose()
        if proposal is None:
            return None
        return Job(trial_name(proposal.number), proposal.number, proposal.values)

    def epoch(self, job: Job, epoch: int, values: Mapping[str, float]) -> str | None:
        """Tell the study; "pruned" where it gives the trial up.

        Raises:
            InputError: A metric of the search is not among the values, so that none would ever be.
        """
        metrics = self._study.search.metrics
        for name in metrics:
            if name not in values:
                known = ", ".join(sorted(values.keys() - {"best", "rows"}))
                raise InputError(
                    f"metrics.{name}: {job.name} has no such validation value; it has {known}"
                )
        value = values[next(iter(metrics))]
        if len(metrics) > 1 or value is None:
            return None
        if self._study.report(job.number, epoch, value):
            self._pruned.add(job.number)
            return PRUNED
        return None

    def ended(self, job: Job, ending: Ending) -> None:
        """Tell the study; a trial that was merely interrupted stays open there.

        Raises:
            InputError: The first trials all failed.
        """
        shown = self._shown(ending.values)
        if ending.state == "interrupted":
            if job.number in self._pruned:
                self._study.pruned(job.number)
                self._say(f"{job.name}: pruned")
            return
        lacking = [name for name in self._study.search.metrics if name not in ending.values]
        if ending.state == "finished" and not lacking:
            self._study.complete(job.number, ending.values, ending.epoch)
            best = self._study.best(1)[0]
            leads = (
                "best so far" if best.number == job.number else f"best {trial_name(best.number)}"
            )
            self._say(f"{job.name}: {shown}  ({leads})")
            return
        reason = ending.reason or f"{', '.join(lacking)} is not a number"
        self._study.fail(job.number, reason)
        self._say(f"{job.name}: failed: {reason}")
        if (why := self._study.hopeless()) is not None:
            raise InputError(f"{why}\nmend that, and give the search another name")

    def _shown(self, values: Mapping[str, float]) -> str:
        metrics = self._study.search.metrics
        return "  ".join(f"{name} {values.get(name, math.nan):.4f}" for name in metrics)


def warm_points(folder: Path, search: SearchConfig) -> list[dict[str, Scalar]]:
    """The best trials of an earlier search, best first: their values that are searched here too.

    Raises:
        InputError: It is no search, has no complete trial, or its values lie outside this space.
    """
    there = SearchFolder(folder)
    config, run = there.load()
    if not (folder / JOURNAL).is_file():
        raise InputError(f"warm_start: {folder} keeps its study in a database; list its `points:`")
    best = Study(config, run, there.path).best(search.top)
    if not best:
        raise InputError(f"warm_start: {folder} has no complete trial; let it finish one first")
    points: list[dict[str, Scalar]] = []
    for trial in best:
        values = trial.user_attrs["values"]
        point = {
            path: values[path]
            for path, distribution in search.space.items()
            if path in values and distribution.holds(values[path])
        }
        if point and point not in points:
            points.append(point)
    if not points:
        raise InputError(
            f"warm_start: no value of the best trials of {folder} is in this search's space; "
            "widen the space, or leave warm_start out"
        )
    return points
