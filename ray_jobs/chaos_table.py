"""The table of `rayfuse chaos`: a row a fault, written into a page."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data.errors import InputError
from data.files import write_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ray_jobs.config import RunConfig
    from ray_jobs.runs import RunFolder

CAUSE_WIDTH = 120
FIRST, LAST = "<!-- rayfuse chaos -->", "<!-- end -->"


@dataclass(frozen=True)
class Outcome:
    """What became of a run under one fault.

    Attributes:
        fault: Its name.
        ended: How the run came to its end.
        said: What the run's log or its error gave as the cause.
        attempts: Groups of workers that it took.
        replayed: Steps done twice.
        seconds: From the last sign of the old workers, or the start of the second command, to the
            first new step.
        difference: Largest absolute one between a weight of it and of the undisturbed run.
    """

    fault: str
    ended: str
    said: str = ""
    attempts: int = 0
    replayed: int | None = None
    seconds: float | None = None
    difference: float | None = None


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a Markdown table."""
    head = (
        "| fault | the run | cause in its log | attempts | steps replayed | seconds to next step | "
        "largest difference of a weight |\n|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *(line_of(outcome) for outcome in outcomes)]) + "\n"


def write(outcomes: Sequence[Outcome], config: RunConfig, out: Path) -> None:
    """Put the table between the marks of a page, or at its end."""
    page = out.read_text(encoding="utf-8") if out.is_file() else f"# Chaos\n\n{FIRST}\n{LAST}\n"
    if FIRST not in page or LAST not in page:
        raise InputError(f"{out}: has no {FIRST} ... {LAST} to write the table between")
    scaling = config.scaling
    run_said = (
        f"{config.model.name} ({scaling.strategy}, {scaling.num_workers} workers), "  # type: ignore[attr-defined]
        f"a checkpoint every {config.checkpoint.every_steps} steps.\n\n"
    )
    before, _, rest = page.partition(FIRST)
    _, _, after = rest.partition(LAST)
    write_text(out, f"{before}{FIRST}\n{run_said}{table(outcomes)}{LAST}{after}")


def difference(one: RunFolder, other: RunFolder) -> float:
    """The largest absolute difference between two runs' weights."""
    from fusion.training.checkpoint import read_weights

    first, second = read_weights(one.best)[0], read_weights(other.best)[0]
    if first.keys() != second.keys():
        raise InputError(f"{one.path} and {other.path} are of different models")
    return max(
        float((first[name].double() - second[name].double()).abs().max())
        for name in first
        if first[name].numel()
    )


def line_of(outcome: Outcome) -> str:
    """As a row of the table."""

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    cells = (
        outcome.fault,
        outcome.ended,
        textwrap.shorten(outcome.said, CAUSE_WIDTH, placeholder=" ..."),
        str(outcome.attempts or ""),
        shown(outcome.replayed, "d"),
        shown(outcome.seconds, ".0f"),
        shown(outcome.difference, ".1e") if outcome.difference else shown(outcome.difference, "g"),
    )
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
