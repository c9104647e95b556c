"""SEARCH.yaml: which dotted paths of a run are searched, over what, and how.

space:
  optim.lr: {log: [1.0e-5, 1.0e-2]}
  model.lambda1: {uniform: [0, 2]}
  optim.schedule: {choice: [constant, plateau]}
  optim.plateau_factor: {uniform: [0.1, 0.9], when: {optim.schedule: plateau}}
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from data.config import Config
from data.errors import InputError
from ray_jobs import config as run_config
from ray_jobs.config_paths import replaced
from ray_jobs.lineage import is_free

if TYPE_CHECKING:
    from collections.abc import Mapping

    from optuna import Trial

    from ray_jobs.config import RunConfig

Scalar = bool | int | float | str | None
KINDS = ("log", "uniform", "int", "choice", "grid")


class Distribution(Config):
    """Exactly one of `log`, `uniform`, `int`, `choice`, `grid`; and when it applies."""

    model_config = ConfigDict(populate_by_name=True)

    log: tuple[float, float] | None = None
    """Lowest and highest, uniform in the logarithm."""
    uniform: tuple[float, float] | None = None
    """Lowest and highest."""
    integer: tuple[int, int] | None = Field(default=None, alias="int")
    """Lowest and highest whole number, both included."""
    choice: tuple[Scalar, ...] | None = None
    """Unordered values."""
    grid: tuple[Scalar, ...] | None = None
    """Values of a grid, in order; every combination is tried where all distributions are grids."""
    when: dict[str, Scalar] = Field(default_factory=dict)
    """Searched path -> the value it must have; the config's own value holds otherwise."""

    @model_validator(mode="after")
    def _coherent(self) -> Distribution:
        given = [name for name in KINDS if self._get(name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(KINDS)}, but got {given or 'none'}")
        kind, values = given[0], self._get(given[0])
        if kind in ("choice", "grid"):
            if not values:
                raise ValueError(f"{kind} is empty; list at least one value")
            if len(set(map(repr, values))) < len(values):
                raise ValueError(f"{kind} lists a value twice: {list(values)}")
            return self
        low, high = values
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{kind}: bounds must be finite, but got {list(values)}")
        if not low < high:
            raise ValueError(f"{kind}: the range is empty, {low} is not below {high}")
        if kind == "log" and low <= 0:
            raise ValueError(f"log: the lowest value must be above 0, but got {low}; use uniform")
        return self

    def _get(self, kind: str) -> Any:
        return getattr(self, "integer" if kind == "int" else kind)

    @property
    def kind(self) -> str:
        """Which of the five it is."""
        return next(name for name in KINDS if self._get(name) is not None)

    @property
    def range(self) -> tuple[float, float] | None:
        """Lowest and highest of a numeric range; None for listed values."""
        return None if self.kind in ("choice", "grid") else self._get(self.kind)

    @property
    def extremes(self) -> tuple[Scalar, ...]:
        """The values that the config schema must accept: both bounds, or every listed one."""
        values: tuple[Scalar, ...] = self._get(self.kind)
        return values

    def holds(self, value: Scalar) -> bool:
        """Whether a value is in the range, or listed."""
        if self.range is None:
            return value in self.extremes
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low, high = self.range
        return low <= value <= high and (self.integer is None or value == int(value))

    def suggest(self, trial: Trial, path: str) -> Scalar:
        """Ask an Optuna trial for a value."""
        if self.log is not None:
            return trial.suggest_float(path, *self.log, log=True)
        if self.uniform is not None:
            return trial.suggest_float(path, *self.uniform)
        if self.integer is not None:
            return trial.suggest_int(path, *self.integer)
        values: Scalar = trial.suggest_categorical(path, self.extremes)
        return values


class Pruning(Config):
    """Which trials are ended early; epochs are the common axis."""

    name: Literal["asha", "median", "none"] = "none"
    min_epochs: int = Field(default=1, ge=1)
    """Epochs that every trial trains."""
    reduction_factor: int = Field(default=3, ge=2)
    """ASHA: one trial in so many goes on at each rung."""
    startup_trials: int = Field(default=5, ge=0)
    """Median: trials that finish before any is ended."""


class SearchConfig(Config):
    """A search: the space, the sampler, the budget, and how the winner is chosen."""

    space: dict[str, Distribution] = Field(min_length=1)
    """Dotted config path -> distribution."""
    metrics: dict[str, Literal["max", "min"]] = Field(default_factory=dict)
    """What a validation line must hold -> better direction; several make a Pareto front. Default:
    the run's train.selection_metric."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    startup_trials: int = Field(default=10, ge=1)
    """Random trials before TPE's model proposes."""
    seed: int = 0
    pruner: Pruning = Pruning()
    trials: int | None = Field(default=None, ge=1)
    """Trials in all; with the grid sampler, default the whole grid."""
    points: tuple[dict[str, Scalar], ...] = ()
    """Values to try first, by path; what they leave out is proposed."""
    warm_start: Path | None = None
    """Folder of an earlier search: its best trials come first, those of their values that are
    searched here."""
    top: int = Field(default=3, ge=1)
    """Best trials that are trained again."""
    seeds: int = Field(default=3, ge=1)
    """Runs of each of them, with seeds that the search did not use."""
    first_failures: int = Field(default=3, ge=1)
    """The search stops if so many first trials all fail."""

    @field_validator("metrics")
    @classmethod
    def _few(cls, value: dict[str, str]) -> dict[str, str]:
        if len(value) > 3:
            raise ValueError(f"at most three metrics make a readable front, but got {len(value)}")
        return value

    @model_validator(mode="after")
    def _conditions(self) -> SearchConfig:
        earlier: dict[str, Distribution] = {}
        for path, distribution in self.space.items():
            for parent, value in distribution.when.items():
                if parent not in earlier:
                    raise ValueError(f"space.{path}.when: {parent} must be searched and come first")
                allowed = earlier[parent]
                if allowed.range is not None or value not in allowed.extremes:
                    raise ValueError(f"space.{path}.when: {parent} is never {value!r}")
            earlier[path] = distribution
        return self

    @model_validator(mode="after")
    def _coherent(self) -> SearchConfig:
        if self.sampler == "grid":
            faulty = [path for path, each in self.space.items() if each.kind != "grid" or each.when]
            if faulty:
                raise ValueError(
                    f"sampler=grid needs `grid:` lists without `when`, which {faulty[0]} is not"
                )
        if self.pruner.name != "none" and len(self.metrics) > 1:
            raise ValueError(f"pruner={self.pruner.name} needs a single metric; set pruner: none")
        for number, point in enumerate(self.points):
            unsearched = sorted(point.keys() - self.space.keys())
            if unsearched:
                raise ValueError(f"points[{number}]: {unsearched[0]} is not searched")
            for path, value in point.items():
                if not self.space[path].holds(value):
                    raise ValueError(f"points[{number}]: {path}={value!r} is outside of its range")
        return self

    def suggest(self, trial: Trial) -> dict[str, Scalar]:
        """A trial's values by path, those whose `when` holds."""
        values: dict[str, Scalar] = {}
        for path, distribution in self.space.items():
            if all(values.get(parent) == wanted for parent, wanted in distribution.when.items()):
                values[path] = distribution.suggest(trial, path)
        return values

    @property
    def grid_size(self) -> int | None:
        """Combinations of the grid; None where something is not a grid."""
        if any(each.kind != "grid" for each in self.space.values()):
            return None
        return math.prod(len(each.extremes) for each in self.space.values())


def load(path: Path, run: RunConfig) -> SearchConfig:
    """The search of a YAML file, each path and each bound checked against the run's schema.

    Raises:
        InputError: A key, path, range or bound is wrong; all wrong ones at once.
    """
    document = run_config.read_yaml(path)
    search = run_config.checked(SearchConfig, document, place=str(path))
    faults = [
        fault
        for dotted, distribution in search.space.items()
        for fault in _faults(run, dotted, distribution)
    ]
    for number, point in enumerate(search.points):
        faults += _refused(run, point, f"points[{number}]")
    if faults:
        raise InputError(f"{path}:\n" + "\n".join(f"  {fault}" for fault in faults))
    if not search.metrics:
        better = "min" if run.train.lowest_is_best else "max"
        search = search.model_copy(update={"metrics": {run.train.selection_metric: better}})
    return search


def _faults(run: RunConfig, path: str, distribution: Distribution) -> list[str]:
    if path == "model.name":
        return ["space.model.name: a search has one model; run one search for each"]
    if path == "seed":
        return ["space.seed: the best of many seeds is luck; the winner is trained with several"]
    if is_free(path):
        return [f"space.{path}: it does not change what a run computes; search something else"]
    found = (
        fault
        for value in distribution.extremes
        for fault in _refused(run, {**distribution.when, path: value}, f"space.{path}")
    )
    return list(dict.fromkeys(found))


def _refused(run: RunConfig, values: Mapping[str, Scalar], where: str) -> list[str]:
    try:
        replaced(run, values)
    except InputError as error:
        lines = str(error).splitlines()
        return [f"{where}: {line.strip()}" for line in lines[1:] or lines]
    return []
