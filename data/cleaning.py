"""From the text of an event to a number or a level, in the benchmark's units and ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from data.events import ITEMS
from data.schema import CHANNELS, CONTINUOUS
from data.units import convert

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from data.ledger import Ledger
    from data.switches import ExtractConfig

_INDEX: Final = {channel.name: v for v, channel in enumerate(CHANNELS)}
CAPILLARY_REFILL: Final = _INDEX["Capillary refill rate"]
GCS_TOTAL: Final = _INDEX["Glascow coma scale total"]
_DIASTOLIC: Final = _INDEX["Diastolic blood pressure"]
_SYSTOLIC: Final = _INDEX["Systolic blood pressure"]
_NON_NEGATIVE: Final = tuple(_INDEX[name] for name in ("Glucose", "Oxygen saturation", "pH"))
"""The released cleaner reads only unsigned numbers in these."""

REFILL_TEXTS: Final = {
    "Normal <3 secs": "0.0",
    "Normal <3 Seconds": "0.0",
    "Brisk": "0.0",
    "Abnormal >3 secs": "1.0",
    "Abnormal >3 Seconds": "1.0",
    "Delayed": "1.0",
}

RANGES: Final[dict[str, tuple[float, float, float, float]]] = {
    "Diastolic blood pressure": (0, 0, 375, 375),
    "Fraction inspired oxygen": (0.2, 0.21, 1, 1.1),
    "Glucose": (0, 33, 2000, 2200),
    "Heart Rate": (0, 0, 350, 390),
    "Height": (0, 0, 240, 275),
    "Mean blood pressure": (0, 14, 330, 375),
    "Oxygen saturation": (0, 0, 100, 150),
    "Respiratory rate": (0, 0, 300, 330),
    "Systolic blood pressure": (0, 0, 375, 375),
    "Temperature": (14.2, 26, 45, 47),
    "Weight": (0, 0, 250, 250),
    "pH": (6.3, 6.3, 8.4, 10),
}
"""Outlier low, valid low, valid high, outlier high: the ranges that mimic3-benchmarks lists (MIT)
and its released extraction never applies."""

_MAX_ITEM: Final = max(ITEMS)


def _channel_of_item() -> NDArray[np.uint8]:
    table = np.zeros(_MAX_ITEM + 1, dtype=np.uint8)
    for item in ITEMS.values():
        table[item.itemid] = item.channel
    return table


def _level_table() -> pl.DataFrame:
    rows = [
        (v, text, float(level))
        for v, channel in enumerate(CHANNELS)
        for level, text in enumerate(channel.levels)
        if v != CAPILLARY_REFILL
    ]
    refill = CHANNELS[CAPILLARY_REFILL].levels
    rows += [(CAPILLARY_REFILL, text, refill.index(to)) for text, to in REFILL_TEXTS.items()]
    schema = {"channel": pl.UInt8, "text": pl.String, "level": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")


_CHANNEL_OF_ITEM: Final = _channel_of_item()
_LEVELS: Final = _level_table()


def clean(rows: pl.DataFrame, config: ExtractConfig, ledger: Ledger) -> pl.DataFrame:
    """Add `channel` (UInt8) and `number` (Float64); rows whose text says nothing drop out.

    `number` of a categorical channel is the index of its level. A text that is no number, or no
    known level, is missing and counted; so is, with `outliers = clip`, a number outside the
    outlier range, and one outside the valid range is moved to its border.

    Args:
        rows: From `data.events.events_of_stays`.
        config: `units` and `outliers`.
        ledger: Where the losses and repairs are counted.
    """
    channel = _CHANNEL_OF_ITEM[rows["itemid"].to_numpy()]
    numeric = np.isin(channel, CONTINUOUS)
    number = _numbers(rows["value"], channel, numeric)
    ledger.count("text that is no number", int((np.isnan(number) & numeric).sum()))
    convert(number, channel, rows, config, ledger)
    if config.outliers == "clip":
        _clip(number, channel, ledger)
    levels = np.flatnonzero(~numeric)
    number[levels] = _level_index(rows["value"][levels], channel[levels])
    ledger.count("text that is no known level", int(np.isnan(number[levels]).sum()))
    named = rows.with_columns(pl.Series("channel", channel), pl.Series("number", number))
    return ledger.keep(
        named,
        "value can be read",
        "events",
        pl.col("number").is_not_nan(),
        "Not a number, no known level, or outside the outlier range: missing.",
    )


def _numbers(
    value: pl.Series, channel: NDArray[np.uint8], numeric: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """[N] the number in each text; NaN where it is none or its channel has levels."""
    number = _cast(value)
    number[~numeric] = np.nan
    odd = np.flatnonzero(np.isnan(number) & numeric)
    if len(odd):
        text = value[odd].str.strip_chars()
        pair = text.str.extract_groups(r"^(\d+)/(\d+)$")
        again = _cast(text)
        for v, group in ((_SYSTOLIC, "1"), (_DIASTOLIC, "2")):
            again = np.where(channel[odd] == v, np.fmax(again, _cast(pair.struct[group])), again)
        number[odd] = again
    number[np.isin(channel, _NON_NEGATIVE) & (number < 0)] = np.nan
    return number


def _cast(text: pl.Series) -> NDArray[np.float64]:
    number = text.cast(pl.Float64, strict=False).fill_null(np.nan).to_numpy().copy()
    number[~np.isfinite(number)] = np.nan
    return number


def _clip(number: NDArray[np.float64], channel: NDArray[np.uint8], ledger: Ledger) -> None:
    for name, (outlier_low, low, high, outlier_high) in RANGES.items():
        of_channel = np.flatnonzero(channel == _INDEX[name])
        values = number[of_channel]
        outlier = (values < outlier_low) | (values > outlier_high)
        inside = np.where(outlier, np.nan, np.clip(values, low, high))
        number[of_channel] = inside
        ledger.count(f"{name.lower()} outside the outlier range", int(outlier.sum()))
        clipped = ~outlier & ~np.isnan(values) & (inside != values)
        ledger.count(f"{name.lower()} clipped to the valid range", int(clipped.sum()))


def _level_index(text: pl.Series, channel: NDArray[np.uint8]) -> NDArray[np.float64]:
    """[N] the level's index; NaN where the text is none of its channel's levels."""
    frame = pl.DataFrame({"channel": channel, "text": text.str.strip_chars()})
    total = pl.col("text").cast(pl.Float64, strict=False)
    whole = (pl.col("channel") == GCS_TOTAL) & (total == total.round(0)) & total.is_between(3, 15)
    written = frame.with_columns(
        pl.when(whole)
        .then(total.cast(pl.Int64, strict=False).cast(pl.String))
        .otherwise("text")
        .alias("text")
    )
    found = written.join(_LEVELS, on=["channel", "text"], how="left", maintain_order="left")
    return found["level"].fill_null(np.nan).to_numpy()
