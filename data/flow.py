"""The attrition flow: every rule that removes something says how much, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from data.config import Config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

T = TypeVar("T")


class FlowStep(Config):
    """One rule: what came in, what was left."""

    rule: str
    """Short name, the same in every partition and release."""
    unit: str
    """What is counted: stays, rows of a table, images."""
    rows_in: int
    rows_out: int
    why: str
    """One sentence, with the method's section."""


class Quarantined(Config):
    """Rows or files set aside, the run going on."""

    place: str
    """Table or file."""
    reason: str
    count: int
    examples: tuple[str, ...] = ()
    """At most five ids or row numbers; never a value of a note."""


def merge_flows(flows: Iterable[Sequence[FlowStep]]) -> list[FlowStep]:
    """Sum the flows of partitions rule by rule, in the order in which rules first appear."""

    def add(a: FlowStep, b: FlowStep) -> FlowStep:
        rows = {"rows_in": a.rows_in + b.rows_in, "rows_out": a.rows_out + b.rows_out}
        return a.model_copy(update=rows)

    return _merge(flows, lambda step: (step.rule, step.unit), add)


def merge_quarantine(parts: Iterable[Sequence[Quarantined]]) -> list[Quarantined]:
    """Sum the quarantines of partitions by place and reason, keeping five examples."""

    def add(a: Quarantined, b: Quarantined) -> Quarantined:
        examples = (*a.examples, *b.examples)[:5]
        return a.model_copy(update={"count": a.count + b.count, "examples": examples})

    return _merge(parts, lambda item: (item.place, item.reason), add)


def _merge(
    parts: Iterable[Sequence[T]], key: Callable[[T], tuple[str, str]], add: Callable[[T, T], T]
) -> list[T]:
    merged: dict[tuple[str, str], T] = {}
    for part in parts:
        for item in part:
            seen = merged.get(key(item))
            merged[key(item)] = item if seen is None else add(seen, item)
    return list(merged.values())
