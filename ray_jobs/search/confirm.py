"""After the search: its best trials are trained again with other seeds, and one of them is tested.

A search's best validation score is the largest of many noisy ones, so it is too good. New seeds
show by how much; the test split is looked at once, for the winner and the default configuration.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.files import write_json
from ray_jobs.search.runner import Ending, Job, job_config, kept
from ray_jobs.search.study import FINISHED
from ray_jobs.search.trials import trial_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from fusion.metrics.bootstrap import Scores
    from ray_jobs.config import RunConfig
    from ray_jobs.predictions import Predictions
    from ray_jobs.search.folder import SearchFolder
    from ray_jobs.search.space import Scalar, SearchConfig
    from ray_jobs.search.study import Study

DEFAULT = "default"
FORMAT = 1


@dataclass(frozen=True)
class Candidate:
    """A configuration that is trained with several seeds.

    Attributes:
        name: The trial's, or "default" for the run as it was given.
        values: Dotted path -> value.
        searched: Its validation value in the search, of the first metric; None for the default.
    """

    name: str
    values: Mapping[str, Scalar]
    searched: float | None = None


def candidates(study: Study) -> list[Candidate]:
    """The best trials, best first, then the default."""
    found = [
        Candidate(trial_name(trial.number), trial.user_attrs["values"], trial.values[0])
        for trial in study.best(study.search.top)
    ]
    return [*found, Candidate(DEFAULT, {})]


def seeds(search: SearchConfig, run: RunConfig) -> list[int]:
    """Seeds that no trial had."""
    return [run.seed + 1 + number for number in range(search.seeds)]


def jobs(study: Study, run: RunConfig) -> list[Job]:
    """A run of each candidate with each seed; seed by seed, so that a budget's end is fair."""
    return [
        Job(f"{candidate.name}-seed-{seed}", number, {**candidate.values, "seed": seed})
        for seed in seeds(study.search, run)
        for number, candidate in enumerate(candidates(study))
    ]


class Retraining:
    """These jobs as a source; those that are finished are passed over."""

    def __init__(
        self, folder: SearchFolder, todo: Sequence[Job], say: Callable[[str], None]
    ) -> None:
        self._todo = [job for job in todo if not folder.trial(job.name).outcome.is_file()]
        self._say = say

    @property
    def left(self) -> int:
        """Jobs to do."""
        return len(self._todo)

    def next(self) -> Job | None:
        """The next."""
        return self._todo.pop(0) if self._todo else None

    def epoch(self, job: Job, epoch: int, values: Mapping[str, float]) -> str | None:
        """None: all are trained to their end."""
        return None

    def ended(self, job: Job, ending: Ending) -> None:
        """Say how; a failed one lacks in the results."""
        if ending.state == "failed":
            self._say(f"{job.name}: failed: {ending.reason}")
        elif ending.state == "finished":
            self._say(f"{job.name}: trained again")


def validated(study: Study, run: RunConfig, folder: SearchFolder) -> list[dict[str, Any]]:
    """Each candidate's validation value by seed, and their mean; None where one lacks."""
    metric = next(iter(study.search.metrics))
    rows = []
    for candidate in candidates(study):
        by_seed: dict[str, float | None] = {}
        for seed in seeds(study.search, run):
            job = Job(f"{candidate.name}-seed-{seed}", 0, {**candidate.values, "seed": seed})
            by_seed[str(seed)] = (
                kept(job_config(run, folder, job))[1].get(metric)
                if folder.trial(job.name).outcome.is_file()
                else None
            )
        known = [value for value in by_seed.values() if value is not None]
        whole = len(known) == len(by_seed)
        rows.append(
            {
                "name": candidate.name,
                "values": dict(candidate.values),
                "searched": candidate.searched,
                "by_seed": by_seed,
                "mean": statistics.fmean(known) if whole else None,
                "spread": statistics.stdev(known) if whole and len(known) > 1 else None,
            }
        )
    return rows


def winner(rows: Sequence[dict[str, Any]], direction: str) -> dict[str, Any] | None:
    """The candidate with the best mean over the seeds, not the default; None where none has one."""
    known = [row for row in rows if row["name"] != DEFAULT and row["mean"] is not None]
    sign = 1 if direction == "max" else -1
    return max(known, key=lambda row: sign * row["mean"], default=None)


def conclude(study: Study, run: RunConfig, folder: SearchFolder) -> dict[str, Any]:
    """Choose the winner and test it, once: what an earlier command found is not computed again.

    Returns:
        JSON: candidates, winner, optimism (by how much the search's value of the winner was better
        than its mean over new seeds), default_is_better, test, and how often the test split was
        looked at: more than once where a concluded search was given more trials.
    """
    before = read(folder)
    trials = sum(trial.state in FINISHED for trial in study.trials)
    if before is not None and before["trials"] == trials and before["winner"]:
        return before
    metric, direction = next(iter(study.search.metrics.items()))
    rows = validated(study, run, folder)
    best, default = winner(rows, direction), rows[-1]
    sign = 1 if direction == "max" else -1
    results: dict[str, Any] = {
        "format": FORMAT,
        "metric": metric,
        "direction": direction,
        "candidates": rows,
        "winner": best and best["name"],
        "optimism": None,
        "default_is_better": None,
        "test": None,
        "trials": trials,
        "looks": before["looks"] if before else 0,
    }
    if best is None:
        return results
    results["optimism"] = sign * (best["searched"] - best["mean"])
    if default["mean"] is not None:
        results["default_is_better"] = sign * (default["mean"] - best["mean"]) >= 0
        names = best["name"], default["name"]
        results["test"] = tested(folder, names, seeds(study.search, run))
        results["looks"] += 1
    write_json(folder.results, results)
    return results


def read(folder: SearchFolder) -> dict[str, Any] | None:
    """What `conclude` found; None before."""
    if not folder.results.is_file():
        return None
    found: dict[str, Any] = json.loads(folder.results.read_text(encoding="utf-8"))
    return found


def tested(folder: SearchFolder, pair: tuple[str, str], of: Sequence[int]) -> dict[str, Any]:
    """Test scores of two configurations, and the first minus the second.

    Each score is the mean over the seeds' runs. Intervals are of resampled patients, the same for
    both; what other seeds would change is not in them.
    """
    from ray_jobs import evaluate

    sides = []
    for name in pair:
        runs = [folder.path / f"{name}-seed-{seed}" for seed in of]
        for run in runs:
            evaluate.run(run, split="test")
        sides.append(mean_scores(runs))
    difference = minus(*sides)
    return {
        metric: {
            "winner": sides[0].mean(metric).to_json(),
            "default": sides[1].mean(metric).to_json(),
            "difference": difference.mean(metric).to_json(),
        }
        for metric in difference.point
    }


def runs_of(folder: SearchFolder, name: str) -> list[Path]:
    """The folders of a candidate's runs, by seed."""
    search, run = folder.load()
    return [folder.path / f"{name}-seed-{seed}" for seed in seeds(search, run)]


def same_patients(one: Path, other: Path) -> bool:
    """Whether two tested runs scored the same rows, in the same order, by the same resamples."""
    from ray_jobs.inference import load_config

    first, second = (_predictions(run).keys for run in (one, other))
    return bool(first.equals(second)) and load_config(one).evaluate == load_config(other).evaluate


def minus(one: Scores, other: Scores) -> Scores:
    """The difference, resample by resample."""
    from fusion.metrics.bootstrap import Scores

    return Scores(
        {m: one.point[m] - other.point[m] for m in one.point},
        {m: one.draws[m] - other.draws[m] for m in one.point},
    )


def mean_scores(runs: Sequence[Path]) -> Scores:
    """The mean of several runs' test scores, in each resample of the patients; F1 at 0.5."""
    import numpy as np

    from fusion.metrics.bootstrap import Scores, bootstrap
    from fusion.metrics.decisions import f1_scores
    from ray_jobs.inference import load_config

    points: dict[str, list[Any]] = {}
    draws: dict[str, list[Any]] = {}
    for run in runs:
        settings, found = load_config(run).evaluate, _predictions(run)
        rows = found.targets, found.probabilities, found.subjects
        for score in (bootstrap, f1_scores):
            scored = score(*rows, resamples=settings.resamples, seed=settings.seed)
            for metric in scored.point:
                points.setdefault(metric, []).append(scored.point[metric])
                draws.setdefault(metric, []).append(scored.draws[metric])
    return Scores(
        {metric: np.mean(each, axis=0) for metric, each in points.items()},
        {metric: np.mean(each, axis=0) for metric, each in draws.items()},
    )


def _predictions(run: Path) -> Predictions:
    from ray_jobs import predictions as prediction_file
    from ray_jobs.runs import RunFolder

    return prediction_file.read(RunFolder(run).evaluation("test") / prediction_file.FILE_NAME)
