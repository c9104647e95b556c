"""Small cells are not shown: no count, score or share of fewer than ten."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SMALL = 10
HIDDEN = "n < 10"


def is_small(count: int) -> bool:
    """Whether a count must not be shown; 0 may."""
    return 0 < count < SMALL


def count_text(count: int) -> str:
    """A count with thousands separators, or that it is small."""
    return f"< {SMALL}" if is_small(count) else f"{count:,}"


def hides_label(rows: int, positives: int) -> bool:
    """Whether a label's scores rest on fewer than ten positives or negatives."""
    return positives < SMALL or rows - positives < SMALL


def hides_group(group: Mapping[str, Any], labels: Sequence[int] | None = None) -> bool:
    """Whether a group's mean scores rest on fewer than ten patients, positives or negatives."""
    rows, positives = group["rows"], group["positives"]
    chosen = range(len(positives)) if labels is None else labels
    positive = sum(positives[c] for c in chosen)
    negative = rows * len(chosen) - positive
    return group["patients"] < SMALL or positive < SMALL or negative < SMALL


def share_text(share: float, rows: int) -> str:
    """A share of rows in percent, unless it or its complement stands for fewer than ten."""
    positives = round(share * rows)
    return HIDDEN if hides_label(rows, positives) else f"{100 * share:.1f} %"
