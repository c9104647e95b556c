"""The search's memory: an Optuna study in a journal file, or a database, that outlives its driver.

What a trial proposes depends on the search's seed, its number and the trials known so far, never on
how often the driver was started again: each proposal has a sampler of its own, seeded by number.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState

from data.errors import InputError
from data.files import sha256_json
from ray_jobs.lineage import computed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from optuna.trial import FrozenTrial

    from ray_jobs.config import RunConfig
    from ray_jobs.search.space import Scalar, SearchConfig

NAME = "rayfuse"
JOURNAL = "journal.log"
DEFAULT_TRIALS = 20
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
# A search is itself only while these stay; budgets and what follows it may change.
_IDENTITY = (
    "space", "metrics", "sampler", "startup_trials", "seed", "pruner", "points", "warm_start",
)  # fmt: skip


@dataclass(frozen=True)
class Proposal:
    """A trial to run.

    Attributes:
        number: In the order of proposals, from 0.
        values: Dotted path -> value.
    """

    number: int
    values: dict[str, Scalar]


class Study:
    """The trials of one search, known again after any restart."""

    def __init__(
        self,
        search: SearchConfig,
        run: RunConfig,
        storage: Path | str,
        first: Callable[[], Sequence[Mapping[str, Scalar]]] = tuple,
    ) -> None:
        """Open the study, or begin it.

        Args:
            search: With its metrics.
            run: What is searched.
            storage: Folder for a journal file, or a database's URL.
            first: Asked, where it begins, for points to try after the search's own.

        Raises:
            InputError: The storage cannot be reached, or holds another search.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.search = search
        self.optuna = optuna.create_study(
            study_name=NAME,
            storage=_storage(storage),
            directions=["maximize" if way == "max" else "minimize" for way in self._ways],
            pruner=_pruner(search),
            load_if_exists=True,
        )
        self._claim(run, storage, first)
        self._left = [
            trial.number
            for trial in self.trials
            if trial.state not in (*FINISHED, TrialState.WAITING)
        ]

    @property
    def _ways(self) -> list[Literal["max", "min"]]:
        return list(self.search.metrics.values())

    @property
    def trials(self) -> list[FrozenTrial]:
        """All, by number."""
        return self.optuna.get_trials(deepcopy=False)

    @property
    def left(self) -> int:
        """Trials that are still to be proposed; those that a driver left running count."""
        limit = self.limit
        begun = sum(trial.state != TrialState.WAITING for trial in self.trials)
        return len(self._left) + max(0, limit - begun)

    @property
    def unfinished(self) -> int:
        """Trials that are not over yet, begun or not."""
        return max(0, self.limit - sum(trial.state in FINISHED for trial in self.trials))

    @property
    def limit(self) -> int:
        """Trials in all."""
        grid = self.search.grid_size if self.search.sampler == "grid" else None
        limits = [each for each in (self.search.trials, grid) if each is not None]
        return min(limits, default=DEFAULT_TRIALS)

    def propose(self) -> Proposal | None:
        """The next trial: first those that an earlier driver left running; None after the last."""
        if self._left:
            number = self._left.pop(0)
            return Proposal(number, dict(self.trials[number].user_attrs["values"]))
        if not self.left:
            return None
        number = sum(trial.state != TrialState.WAITING for trial in self.trials)
        self.optuna.sampler = _sampler(self.search, number)
        trial = self.optuna.ask()
        values = self.search.suggest(trial)
        trial.set_user_attr("values", values)
        return Proposal(trial.number, values)

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Take note of a trial's metric after an epoch; True where the trial should end now."""
        trial = self._trial(number)
        if epoch not in self.trials[number].intermediate_values:
            trial.report(value, epoch)
        return trial.should_prune() if self.search.pruner.name != "none" else False

    def complete(self, number: int, values: Mapping[str, float], epoch: int | None = None) -> None:
        """A trial's end, with the metrics of the weights that it keeps, and their epoch.

        Raises:
            InputError: One of the search's metrics is not among them.
        """
        for name in self.search.metrics:
            if name not in values:
                known = ", ".join(sorted(values))
                raise InputError(f"metrics.{name}: a trial has no such value; it has {known}")
        self._trial(number).set_user_attr("epoch", epoch)
        self.optuna.tell(number, [values[name] for name in self.search.metrics])

    def pruned(self, number: int) -> None:
        """A trial was ended early."""
        self.optuna.tell(number, state=TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> None:
        """A trial failed."""
        self._trial(number).set_user_attr("reason", reason)
        self.optuna.tell(number, state=TrialState.FAIL)

    def hopeless(self) -> str | None:
        """Why the search should stop: its first trials all failed; None while it should not."""
        first = [trial for trial in self.trials if trial.state in FINISHED]
        first = first[: self.search.first_failures]
        if len(first) < self.search.first_failures:
            return None
        if any(trial.state != TrialState.FAIL for trial in first):
            return None
        reasons = "\n".join(
            f"  trial {trial.number}: {trial.user_attrs.get('reason', 'unknown')}"
            for trial in first
        )
        return f"the first {len(first)} trials all failed:\n{reasons}"

    def best(self, count: int) -> list[FrozenTrial]:
        """The best complete trials, best first; of several metrics, those of the Pareto front."""
        if len(self._ways) > 1:
            return self.optuna.best_trials[:count]
        sign = -1 if self._ways[0] == "max" else 1
        done = [trial for trial in self.trials if trial.state == TrialState.COMPLETE]
        return sorted(done, key=lambda trial: (sign * _value(trial), trial.number))[:count]

    def _trial(self, number: int) -> optuna.Trial:
        return optuna.Trial(self.optuna, self.trials[number]._trial_id)

    def _claim(
        self,
        run: RunConfig,
        storage: Path | str,
        first: Callable[[], Sequence[Mapping[str, Scalar]]],
    ) -> None:
        mine = _identity(self.search, run)
        theirs = self.optuna.user_attrs.get("identity")
        if theirs is None:
            # The identity comes last: a driver killed before it has begun nothing.
            known = [trial.system_attrs.get("fixed_params") for trial in self.trials]
            for point in _points(self.search, first()):
                if point not in known:
                    self.optuna.enqueue_trial(point)
            self.optuna.set_user_attr("identity", mine)
            return
        changed = sorted(key for key in mine if mine[key] != theirs.get(key))
        if changed:
            raise InputError(
                f"{storage} holds another search: {', '.join(changed)} differ; give this one "
                "another name"
            )


def _identity(search: SearchConfig, run: RunConfig) -> dict[str, str]:
    dumped = search.model_dump(mode="json", by_alias=True)
    searched = {key: sha256_json(dumped[key]) for key in _IDENTITY}
    return {**searched, "run": sha256_json(computed(run))}


def _points(search: SearchConfig, first: Sequence[Mapping[str, Scalar]]) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = [dict(point) for point in (*search.points, *first)]
    if search.sampler != "grid":
        return points
    axes = [[(path, value) for value in each.extremes] for path, each in search.space.items()]
    grid = [dict(combination) for combination in itertools.product(*axes)]
    # In a drawn order: a grid cut short by its budget has then seen all of every axis.
    random.Random(search.seed).shuffle(grid)
    return points + [each for each in grid if each not in points]


def _sampler(search: SearchConfig, number: int) -> optuna.samplers.BaseSampler:
    digest = hashlib.sha256(f"{search.seed}/{number}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    if search.sampler == "tpe":
        return optuna.samplers.TPESampler(
            n_startup_trials=search.startup_trials,
            seed=seed,
            multivariate=True,
            group=any(each.when for each in search.space.values()),
            constant_liar=True,
        )
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(search: SearchConfig) -> optuna.pruners.BasePruner:
    pruning = search.pruner
    if pruning.name == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=pruning.min_epochs, reduction_factor=pruning.reduction_factor
        )
    if pruning.name == "median":
        return optuna.pruners.MedianPruner(
            n_startup_trials=pruning.startup_trials, n_warmup_steps=pruning.min_epochs
        )
    return optuna.pruners.NopPruner()


def _storage(storage: Path | str) -> optuna.storages.BaseStorage:
    if isinstance(storage, str):
        try:
            return optuna.storages.RDBStorage(storage)
        except Exception as error:
            place = storage.split("@")[-1]
            raise InputError(
                f"the search's database at {place} cannot be opened ({type(error).__name__}); "
                "check the URL and its driver"
            ) from None
    storage.mkdir(parents=True, exist_ok=True)
    path = str(storage / JOURNAL)
    backend = JournalFileBackend(path, lock_obj=JournalFileOpenLock(path))
    return optuna.storages.JournalStorage(backend)


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value
