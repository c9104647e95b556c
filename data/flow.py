"""The attrition flow: every rule that removes something says how much, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.config import Config

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


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
    merged: dict[tuple[str, str], FlowStep] = {}
    for flow in flows:
        for step in flow:
            key = (step.rule, step.unit)
            seen = merged.get(key)
            merged[key] = (
                step
                if seen is None
                else seen.model_copy(
                    update={
                        "rows_in": seen.rows_in + step.rows_in,
                        "rows_out": seen.rows_out + step.rows_out,
                    }
                )
            )
    return list(merged.values())


def merge_quarantine(parts: Iterable[Sequence[Quarantined]]) -> list[Quarantined]:
    """Sum the quarantines of partitions by place and reason, keeping five examples."""
    merged: dict[tuple[str, str], Quarantined] = {}
    for part in parts:
        for item in part:
            key = (item.place, item.reason)
            seen = merged.get(key)
            merged[key] = (
                item
                if seen is None
                else seen.model_copy(
                    update={
                        "count": seen.count + item.count,
                        "examples": (*seen.examples, *item.examples)[:5],
                    }
                )
            )
    return list(merged.values())
