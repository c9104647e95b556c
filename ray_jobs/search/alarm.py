"""The boundary alarm: a best value at the edge of its range says that the range was too narrow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from data.errors import InputError
from ray_jobs.config_paths import replaced

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray_jobs.config import RunConfig
    from ray_jobs.search.space import Distribution, Scalar, SearchConfig

GEOMETRIC = 3.0
"""Ratio of two neighbours from which on a grid counts as geometric."""
NEAR = 0.05
"""Share of a range, in its own scale, that counts as its edge."""


@dataclass(frozen=True)
class Alarm:
    """One path whose best value is at an edge.

    Attributes:
        path: Dotted.
        value: The best.
        side: Which edge.
        edge: Its value.
        advice: What to try next, in the search's own words; None where the config ends there too.
    """

    path: str
    value: float
    side: Literal["lowest", "highest"]
    edge: float
    advice: str | None

    def text(self) -> str:
        """In a sentence."""
        head = f"{self.path}: the best value {self.value:.4g} is at the {self.side} edge"
        if self.advice is None:
            return f"{head}, {self.edge:.4g}, beyond which the config allows nothing"
        return f"{head}, {self.edge:.4g}; try {self.advice} next"


def alarms(search: SearchConfig, run: RunConfig, values: Mapping[str, Scalar]) -> list[Alarm]:
    """The alarms of a search whose best values these are; unordered choices raise none."""
    found = []
    for path, distribution in search.space.items():
        value = values.get(path)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        levels = _levels(distribution)
        if len(levels) > 1 and (side := _side(distribution, levels, value)):
            found.append(_alarm(run, path, distribution, levels, (value, side)))
    return found


def _levels(distribution: Distribution) -> list[float]:
    """Both bounds of a range, or all numbers of a grid, in order; none where they have no order."""
    if distribution.range is not None:
        return list(distribution.range)
    if distribution.grid is None:
        return []
    numbers = [
        float(each)
        for each in distribution.grid
        if isinstance(each, int | float) and not isinstance(each, bool)
    ]
    return sorted(numbers) if len(numbers) == len(distribution.grid) else []


def _side(
    distribution: Distribution, levels: list[float], value: float
) -> Literal["lowest", "highest"] | None:
    low, high = levels[0], levels[-1]
    if distribution.grid is not None:
        return "lowest" if value == low else "highest" if value == high else None
    if distribution.log is not None:
        place = math.log(value / low) / math.log(high / low)
    else:
        place = (value - low) / (high - low)
    return "lowest" if place < NEAR else "highest" if place > 1 - NEAR else None


def _alarm(
    run: RunConfig,
    path: str,
    distribution: Distribution,
    levels: list[float],
    best: tuple[float, Literal["lowest", "highest"]],
) -> Alarm:
    value, side = best
    edge = levels[0] if side == "lowest" else levels[-1]
    beyond = _beyond(distribution, levels, side)
    # Halfway where the config refuses the whole step, e.g. a share above 1.
    for candidate in (beyond, (beyond + edge) / 2):
        if candidate != edge and _accepted(run, path, distribution, candidate):
            return Alarm(path, value, side, edge, _advice(distribution, levels, side, candidate))
    return Alarm(path, value, side, edge, None)


def _beyond(distribution: Distribution, levels: list[float], side: str) -> float:
    """As far again: half of a range's width, by ratio where it is logarithmic; a grid's step."""
    low, high = levels[0], levels[-1]
    inner, edge = (levels[1], low) if side == "lowest" else (levels[-2], high)
    if distribution.grid is not None:
        geometric = inner > 0 and edge > 0 and max(inner / edge, edge / inner) >= GEOMETRIC
        return edge * edge / inner if geometric else edge + (edge - inner)
    if distribution.log is not None:
        ratio = math.sqrt(high / low)
        return low / ratio if side == "lowest" else high * ratio
    step = (high - low) / 2
    if distribution.integer is not None:
        step = max(1, round(step))
    return low - step if side == "lowest" else high + step


def _accepted(run: RunConfig, path: str, distribution: Distribution, value: float) -> bool:
    whole = distribution.integer is not None or all(
        isinstance(each, int) for each in distribution.extremes
    )
    if whole and value != int(value):
        return False
    try:
        replaced(run, {**distribution.when, path: int(value) if whole else value})
    except InputError:
        return False
    return True


def _advice(distribution: Distribution, levels: list[float], side: str, beyond: float) -> str:
    if distribution.grid is not None:
        more = [beyond, *levels] if side == "lowest" else [*levels, beyond]
        return f"grid: [{', '.join(f'{each:.4g}' for each in more)}]"
    # On from the middle: what lay on the far side was worse.
    low, high = levels
    middle = math.sqrt(low * high) if distribution.log is not None else (low + high) / 2
    if distribution.integer is not None:
        middle = round(middle)
    pair = (beyond, middle) if side == "lowest" else (middle, beyond)
    return f"{distribution.kind}: [{pair[0]:.4g}, {pair[1]:.4g}]"
