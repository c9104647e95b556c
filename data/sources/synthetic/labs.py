"""Laboratory results, among them some of the 17 variables, and urine output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from data.lab_units import NORMAL
from data.sources.synthetic import items
from data.sources.synthetic.charting import Rows, codes_of, make_rows
from data.sources.synthetic.people import HOUR

if TYPE_CHECKING:
    from data.sources.synthetic.config import HospitalConfig
    from data.sources.synthetic.people import Block


ABNORMAL = pl.when(
    pl.any_horizontal(
        (pl.col("itemid") == item.itemid)
        & ~pl.col("valuenum")
        .cast(pl.Float64, strict=False)
        .is_between(*NORMAL[item.label.lower()][1:])
        for item in items.LABS
    )
).then(pl.lit("abnormal"))
"""The laboratory's flag, from a frame of `event_frame`."""


def lab_rows(
    block: Block,
    rng: np.random.Generator,
    side: np.ndarray,
    config: HospitalConfig,
    *,
    quirks: bool,
) -> tuple[Rows, np.ndarray]:
    """Panels about every eight hours; labs carry no stay, and with quirks some no admission.

    Args:
        block: The people.
        rng: The labs' stream.
        side: int8 [A, n labs] of `clinical`: where each test is moved.
        config: `lab_shift` says how far.
        quirks: Malformed values, missing admissions, results before the admission.

    Returns:
        The rows, and for each admission and test the sum of (value - mean) / spread: float64
        [A, n labs], of the values as drawn.
    """
    evidence = np.zeros((len(block.hadm), len(items.LABS)))
    count = np.maximum(np.floor(block.hours / 8).astype(np.int64), 1)
    panel = np.repeat(np.arange(len(count)), count)
    hour = (np.arange(len(panel)) - np.repeat(np.cumsum(count) - count, count)) * 8
    drawn = block.intime[panel] + hour * HOUR + rng.integers(0, 400, len(panel)) * 60
    parts = []
    for k, (item, (mean, spread, decimals)) in enumerate(
        zip(items.LABS, items.LAB_LEVELS, strict=True)
    ):
        at = rng.random(len(panel)) < (0.3 if item.category == "Blood Gas" else 0.7)
        admission = block.stay_admission[panel[at]]
        drawn_at = rng.normal(mean, spread, int(at.sum()))
        drawn_at += side[admission, k] * config.lab_shift * spread
        np.add.at(evidence[:, k], admission, (drawn_at - mean) / spread)
        number = np.maximum(np.round(drawn_at, decimals), 10.0**-decimals)
        if item.label == "Oxygen Saturation":
            number = np.minimum(number, 100.0)
        parts.append(make_rows(panel[at], drawn[at], item.itemid, number, rng))
    rows = Rows.join(parts)
    rows.bound[:] = 1
    if quirks:
        rows.bound[rng.random(len(rows)) < 0.03] = 2
        bad = rng.random(len(rows)) < 0.01
        rows.text[bad] = rng.choice(codes_of(items.BAD_TEXT), int(bad.sum()))
        rows.number[bad] = np.nan
        early = rows.take(rng.random(len(rows)) < 0.05)
        early.time = block.admit[block.stay_admission[early.stay]] - 90 * 60
        rows = Rows.join([rows, early])
    return rows, evidence


def output_rows(block: Block, carevue: np.ndarray, rng: np.random.Generator) -> Rows:
    """Urine every two hours."""
    count = np.maximum(np.floor(block.hours / 2).astype(np.int64), 1)
    stay = np.repeat(np.arange(len(count)), count)
    hour = (np.arange(len(stay)) - np.repeat(np.cumsum(count) - count, count)) * 2
    item = np.where(carevue[stay], items.OUTPUT_CAREVUE.itemid, items.OUTPUT.itemid)
    amount = np.rint(rng.gamma(3.0, 40.0, len(stay)))
    return make_rows(stay, block.intime[stay] + hour * HOUR, item, amount, rng)
