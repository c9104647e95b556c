"""The items of the 17 variables, and which stay an event belongs to."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from data.schema import CHANNELS

_CHANNEL_INDEX: Final = {channel.name: v for v, channel in enumerate(CHANNELS)}


@dataclass(frozen=True)
class Item:
    """One MIMIC item that carries a benchmark variable.

    Attributes:
        itemid: MIMIC's id.
        channel: Index into CHANNELS.
        label: MIMIC's label; the released code reads units from it alone.
        source: chart, lab or output.
        system: carevue (MIMIC-III only), metavision or lab.
        unit: What the label says its numbers are in (F, C, in, cm, lb, oz, kg), else empty.
        derived: Used only where ExtractConfig.derive is on (not in the released item map).
    """

    itemid: int
    channel: int
    label: str
    source: str
    system: str
    unit: str
    derived: bool


def _load_items() -> dict[int, Item]:
    path = Path(__file__).parent / "resources" / "items.csv"
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    return {
        int(row["itemid"]): Item(
            itemid=int(row["itemid"]),
            channel=_CHANNEL_INDEX[row["channel"]],
            label=row["label"],
            source=row["source"],
            system=row["system"],
            unit=row["unit"],
            derived=row["status"] == "derived",
        )
        for row in csv.DictReader(lines)
    }


ITEMS: Final[dict[int, Item]] = _load_items()
"""itemid -> Item: the 114 `ready` ids of the benchmark and two of capillary refill."""


def item_ids(release: str, source: str | None = None) -> frozenset[int]:
    """The items to keep when reading a release; all else can be dropped while scanning.

    Args:
        release: As detected, e.g. `mimic-iii-1.4`; only MIMIC-III has CareVue items.
        source: Of one table only: chart, lab or output.
    """
    carevue = release.startswith("mimic-iii")
    return frozenset(
        item.itemid
        for item in ITEMS.values()
        if (carevue or item.system != "carevue") and source in (None, item.source)
    )
