"""Charted rows as the columns that both releases share, in the order of subject and time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from data.sources.synthetic.charting import TEXTS, UNIT_TEXTS
from data.sources.synthetic.writer import times

if TYPE_CHECKING:
    from data.sources.synthetic.charting import Rows
    from data.sources.synthetic.people import Block


def event_frame(rows: Rows, block: Block) -> pl.DataFrame:
    """subject_id, hadm_id, stay_id, charttime, storetime, itemid, value, valuenum, valueuom.

    `value` and `valuenum` are text, so that 98 is written "98" and not "98.0".
    """
    patient = block.stay_patient[rows.stay]
    order = np.lexsort((rows.itemid, rows.time, patient))
    rows = rows.take(order)
    patient, admission = patient[order], block.stay_admission[rows.stay]
    texts = pl.Series("text", TEXTS, dtype=pl.String)
    units = pl.Series("unit", [u or None for u in UNIT_TEXTS], dtype=pl.String)
    number = pl.Series("number", rows.number).fill_nan(None)
    whole = number == number.round(0)
    printed = (
        pl.DataFrame({"n": number, "whole": whole})
        .select(
            pl.when("whole")
            .then(pl.col("n").cast(pl.Int64, strict=False).cast(pl.String))
            .otherwise(pl.col("n").round(4).cast(pl.String))
            .alias("n")
        )
        .to_series()
    )
    text = texts.gather(pl.Series(np.maximum(rows.text, 0)).cast(pl.UInt32))
    return (
        pl.DataFrame(
            {
                "subject_id": block.subject[patient],
                "hadm_id": block.hadm[admission],
                "stay_id": block.stay[rows.stay],
                "charttime": times(rows.time),
                "storetime": times(rows.time + rows.delay),
                "itemid": rows.itemid,
                "value": text,
                "valuenum": printed,
                "valueuom": units.gather(pl.Series(rows.unit).cast(pl.UInt32)),
                "_text": rows.text,
                "_bound": rows.bound,
            }
        )
        .with_columns(
            pl.when(pl.col("_text") >= 0).then("value").otherwise("valuenum").alias("value"),
            pl.when(pl.col("_bound") < 2).then("hadm_id").alias("hadm_id"),
            pl.when(pl.col("_bound") < 1).then("stay_id").alias("stay_id"),
        )
        .drop("_text", "_bound")
    )
