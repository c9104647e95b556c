"""What one partition's rules removed, set aside and repaired, as they run."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from data.flow import FlowStep, Quarantined

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import polars as pl

_EXAMPLES = 5


@dataclass
class Ledger:
    """Collects the attrition flow; the cohort rules write into it in their order."""

    flow: list[FlowStep] = field(default_factory=list)
    quarantine: list[Quarantined] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    excluded: dict[str, list[int]] = field(default_factory=dict)
    """Rule -> stay_id of the stays that it removed, sorted."""

    def step(self, rule: str, unit: str, sizes: tuple[int, int], why: str) -> None:
        """Note a rule that left `sizes[1]` of `sizes[0]`, also one that removed nothing."""
        self.flow.append(
            FlowStep(rule=rule, unit=unit, rows_in=sizes[0], rows_out=sizes[1], why=why)
        )

    def keep(
        self, frame: pl.DataFrame, rule: str, unit: str, condition: pl.Expr, why: str
    ) -> pl.DataFrame:
        """The rows of which `condition` holds (null counts as no), noted as one step."""
        kept = frame.filter(condition)
        self.step(rule, unit, (frame.height, kept.height), why)
        if unit == "stays":
            self.exclude(rule, frame["stay_id"], kept["stay_id"])
        return kept

    def keep_each(
        self, frame: pl.DataFrame, unit: str, rules: Sequence[tuple[str, pl.Expr, str]]
    ) -> pl.DataFrame:
        """Several rules (name, condition, why) in turn over one frame, in one pass."""
        holds: list[pl.Expr] = []
        for _, condition, _ in rules:
            so_far = condition.fill_null(value=False)
            holds.append(holds[-1] & so_far if holds else so_far)
        masks = frame.select(mask.alias(str(i)) for i, mask in enumerate(holds))
        left = frame.height
        for i, (rule, _, why) in enumerate(rules):
            kept = int(masks[str(i)].sum())
            self.step(rule, unit, (left, kept), why)
            left = kept
        return frame.filter(masks.to_series(-1))

    def exclude(self, rule: str, before: pl.Series, after: pl.Series) -> None:
        """Note which stays a rule removed, so that two cohorts can be compared stay by stay."""
        lost = before.filter(~before.is_in(after.implode())).unique().sort()
        self.excluded.setdefault(rule, []).extend(lost.to_list())

    def set_aside(self, place: str, reason: str, count: int, examples: Iterable[object]) -> None:
        """Quarantine `count` rows of a table, naming at most five of them."""
        if count:
            named = tuple(str(example) for example in islice(examples, _EXAMPLES))
            self.quarantine.append(
                Quarantined(place=place, reason=reason, count=count, examples=named)
            )

    def count(self, name: str, amount: int) -> None:
        """Add to a counter; a counter that was asked for is there even when it is zero."""
        self.counters[name] = self.counters.get(name, 0) + int(amount)
