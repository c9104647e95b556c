"""One value for each variable and time: which of several wins, and the derived coma scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from data.cleaning import GCS_TOTAL
from data.schema import CHANNELS, CONTINUOUS, N_CHANNELS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from data.ledger import Ledger
    from data.switches import ExtractConfig

_INDEX: Final = {channel.name: v for v, channel in enumerate(CHANNELS)}
_AS_TEXT: Final = [
    _INDEX[name]
    for name in (
        "Heart Rate",
        "Mean blood pressure",
        "Respiratory rate",
        "Glascow coma scale eye opening",
        "Glascow coma scale motor response",
        "Glascow coma scale total",
        "Glascow coma scale verbal response",
    )
]
"""Channels without a released cleaner: they are text when the released code sorts them."""

EYE: Final = _INDEX["Glascow coma scale eye opening"]
MOTOR: Final = _INDEX["Glascow coma scale motor response"]
VERBAL: Final = _INDEX["Glascow coma scale verbal response"]

SCORES: Final[dict[int, dict[str, int]]] = {
    EYE: {
        "None": 1,
        "1 No Response": 1,
        "To Pain": 2,
        "2 To pain": 2,
        "To Speech": 3,
        "3 To speech": 3,
        "Spontaneously": 4,
        "4 Spontaneously": 4,
    },
    MOTOR: {
        "No response": 1,
        "1 No Response": 1,
        "Abnormal extension": 2,
        "2 Abnorm extensn": 2,
        "Abnormal Flexion": 3,
        "3 Abnorm flexion": 3,
        "Flex-withdraws": 4,
        "4 Flex-withdraws": 4,
        "Localizes Pain": 5,
        "5 Localizes Pain": 5,
        "Obeys Commands": 6,
        "6 Obeys Commands": 6,
    },
    VERBAL: {
        "No Response": 1,
        "No Response-ETT": 1,
        "1 No Response": 1,
        "1.0 ET/Trach": 1,
        "Incomprehensible sounds": 2,
        "2 Incomp sounds": 2,
        "Inappropriate Words": 3,
        "3 Inapprop words": 3,
        "Confused": 4,
        "4 Confused": 4,
        "Oriented": 5,
        "5 Oriented": 5,
    },
}
"""Points of each level; an intubated patient's verbal response is 1, as MIMIC's valuenum has it."""


@dataclass(frozen=True)
class Points:
    """Values of variables at times, at most one of each; sorted by (stay, channel, offset).

    Attributes:
        stay: [N] row of the stay.
        channel: [N].
        offset: [N] microseconds since intime.
        number: [N] the value, or the level's index.
        available: [N] microseconds since intime at which it was known.
    """

    stay: NDArray[np.int64]
    channel: NDArray[np.int64]
    offset: NDArray[np.int64]
    number: NDArray[np.float64]
    available: NDArray[np.int64]


def one_per_time(rows: pl.DataFrame, config: ExtractConfig, ledger: Ledger) -> Points:
    """Resolve several values of one variable of one stay at one time.

    `storetime`: the later stored wins; of those stored together, or without a storetime, the mean
    of numbers, and the last text (by source, item, position in the file).
    `text_maximum`: the last after the released code's sort: the largest number, but the largest
    text of the channels that are never cleaned, so that 98 beats 102. (Where none of a subject's
    values is text, pandas reads them all as numbers and the largest number wins.)

    Args:
        rows: From `data.cleaning.clean`, with `available` (Int64) and `subject_has_text`.
        config: `duplicates` and `derive`.
        ledger: Where the repairs are counted.
    """
    group = rows["stay"].to_numpy().astype(np.int64) * N_CHANNELS + rows["channel"].to_numpy()
    order = _order(group, rows["offset"].to_numpy())
    group, offset = group[order], rows["offset"].to_numpy()[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (group[1:] != group[:-1]) | (offset[1:] != offset[:-1])
    last = np.append(new[1:], True)[: len(order)]
    number, available = rows["number"].to_numpy()[order], rows["available"].to_numpy()[order]
    repeated = np.flatnonzero(~(new & last))
    if len(repeated):
        several = rows[order[repeated]].with_columns(pl.Series("key", np.cumsum(new)[repeated]))
        resolved = _RULES[config.duplicates](several)
        ends = repeated[last[repeated]]
        number[ends] = resolved["number"].to_numpy()
        available[ends] = resolved["available"].to_numpy()
    ledger.step(
        "one value per variable and time",
        "events",
        (len(order), int(last.sum())),
        "The later stored of several, or the released code's sort.",
    )
    points = Points(
        stay=group[last] // N_CHANNELS,
        channel=group[last] % N_CHANNELS,
        offset=offset[last],
        number=number[last],
        available=available[last],
    )
    return _with_total(points, ledger) if config.derive else points


def _order(group: NDArray[np.int64], offset: NDArray[np.int64]) -> NDArray[np.intp]:
    """[N] the rows sorted by (group, offset); one packed key sorts twice as fast as two."""
    if not len(group):
        return np.zeros(0, dtype=np.intp)
    lowest = offset.min()
    span = int(offset.max() - lowest) + 1
    if (int(group.max()) + 1) * span < 2**62:
        return np.argsort(group * span + (offset - lowest), kind="stable")
    return np.lexsort((offset, group))


def _by_storetime(several: pl.DataFrame) -> pl.DataFrame:
    latest = several.sort("key", "storetime", "source", "itemid", "row", nulls_last=False).filter(
        pl.col("storetime").eq_missing(pl.col("storetime").last().over("key"))
    )
    is_number = pl.col("channel").first().is_in(CONTINUOUS)
    mean = pl.col("number").sum() / pl.len()
    return latest.group_by("key", maintain_order=True).agg(
        pl.when(is_number).then(mean).otherwise(pl.col("number").last()).alias("number"),
        pl.col("available").max(),
    )


def _by_text(several: pl.DataFrame) -> pl.DataFrame:
    as_text = pl.col("channel").is_in(_AS_TEXT) & pl.col("subject_has_text")
    ranked = several.with_columns(
        pl.when(as_text).then("value").otherwise(pl.lit("")).alias("text_rank"),
        pl.when(as_text).then(0.0).otherwise("number").alias("number_rank"),
    )
    return (
        ranked.sort("key", "text_rank", "number_rank", "available")
        .group_by("key", maintain_order=True)
        .agg(pl.col("number", "available").last())
    )


_RULES: Final = {"storetime": _by_storetime, "text_maximum": _by_text}


def _with_total(points: Points, ledger: Ledger) -> Points:
    """Add the coma scale's total where its three parts share a time and no total was charted."""
    part = np.isin(points.channel, (EYE, MOTOR, VERBAL))
    frame = pl.DataFrame(
        {
            "stay": points.stay[part],
            "offset": points.offset[part],
            "score": _scores(points.channel[part], points.number[part]),
            "available": points.available[part],
        }
    )
    charted = points.channel == GCS_TOTAL
    explicit = pl.DataFrame({"stay": points.stay[charted], "offset": points.offset[charted]})
    totals = (
        frame.group_by("stay", "offset")
        .agg(pl.len().alias("parts"), pl.col("score").sum(), pl.col("available").max())
        .filter(pl.col("parts") == len(SCORES))
        .join(explicit, on=["stay", "offset"], how="anti")
    )
    ledger.count("coma scale total derived from its parts", totals.height)
    stay = np.concatenate([points.stay, totals["stay"].to_numpy()])
    offset = np.concatenate([points.offset, totals["offset"].to_numpy()])
    channel = np.concatenate([points.channel, np.full(totals.height, GCS_TOTAL)])
    number = np.concatenate([points.number, _TOTAL_LEVEL[totals["score"].to_numpy()]])
    available = np.concatenate([points.available, totals["available"].to_numpy()])
    order = _order(stay * N_CHANNELS + channel, offset)
    return Points(stay[order], channel[order], offset[order], number[order], available[order])


def _total_levels() -> NDArray[np.float64]:
    levels = CHANNELS[GCS_TOTAL].levels
    return np.asarray([levels.index(str(n)) if str(n) in levels else np.nan for n in range(16)])


def _score_table() -> NDArray[np.int64]:
    width = max(len(CHANNELS[v].levels) for v in SCORES)
    table = np.zeros((N_CHANNELS, width), dtype=np.int64)
    for v, scores in SCORES.items():
        for level, text in enumerate(CHANNELS[v].levels):
            table[v, level] = scores[text]
    return table


_TOTAL_LEVEL: Final = _total_levels()
_SCORE_TABLE: Final = _score_table()


def _scores(channel: NDArray[np.int64], level: NDArray[np.float64]) -> NDArray[np.int64]:
    return _SCORE_TABLE[channel, level.astype(np.int64)]
