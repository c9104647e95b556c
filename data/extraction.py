"""From the typed tables of one subject partition to its samples. Pure: no files, no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

    from data.flow import FlowStep, Quarantined


@dataclass(frozen=True)
class PartitionResult:
    """What one partition gives.

    Attributes:
        samples: The columns of SHARD_SCHEMA but `cxr`, plus `path` of the image (null without).
            Sorted by (subject_id, stay_id, dicom_id), so that it does not depend on row order.
        flow: Each rule in order, also those that removed nothing.
        quarantine: Rows set aside.
        counters: Counted repairs.
    """

    samples: pl.DataFrame
    flow: list[FlowStep]
    quarantine: list[Quarantined] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
