"""Units of the 17 variables: what a number was recorded in, and its value in the benchmark's unit.

Divisions are done by numpy: polars computes x / constant as x * (1 / constant), one unit in the
last place off in some values of the released extraction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from data.events import ITEMS
from data.schema import CHANNELS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from data.ledger import Ledger
    from data.switches import ExtractConfig

_INDEX: Final = {channel.name: v for v, channel in enumerate(CHANNELS)}
OXYGEN_FRACTION: Final = _INDEX["Fraction inspired oxygen"]
HEIGHT: Final = _INDEX["Height"]
SATURATION: Final = _INDEX["Oxygen saturation"]
TEMPERATURE: Final = _INDEX["Temperature"]
WEIGHT: Final = _INDEX["Weight"]

SURELY_FAHRENHEIT: Final = 79.0
_ALWAYS_PERCENT: Final = "%"
POUND_KG: Final = 0.453592
INCH_CM: Final = 2.54

_NAMED: Final[dict[int, tuple[tuple[str, str], ...]]] = {
    TEMPERATURE: (("f", "F"), ("c", "C")),
    WEIGHT: (("oz", "oz"), ("lb", "lb"), ("pound", "lb"), ("kg", "kg")),
    HEIGHT: (("in", "in"), ("cm", "cm")),
    OXYGEN_FRACTION: (("torr", "torr"),),
}
"""Per channel: a part of valueuom in lower case, and the unit it names; the first match counts."""


def convert(
    numbers: NDArray[np.float64],
    channel: NDArray[np.uint8],
    rows: pl.DataFrame,
    config: ExtractConfig,
    ledger: Ledger,
) -> None:
    """Bring numbers to fraction, percent, °C, kg and cm, in place (mimic3-benchmarks' cleaners).

    `read`: valueuom names the unit; where it does not, the item's label does, and a temperature
    from 79 on is Fahrenheit. Oxygen above 1 that is not in torr is percent.
    `as_found`: valueuom is never seen, so oxygen is always divided by 100, a height is in inches
    only where the label says so, and Fahrenheit is known by its size alone.

    Args:
        numbers: [N], NaN where missing.
        channel: [N].
        rows: itemid and valueuom of the same N rows.
        config: `units`.
        ledger: Counts the conversions.
    """
    saturation = np.flatnonzero((channel == SATURATION) & (numbers <= 1))
    numbers[saturation] = numbers[saturation] * 100.0
    ledger.count("oxygen saturation as a fraction to percent", len(saturation))
    for v in (TEMPERATURE, WEIGHT, HEIGHT, OXYGEN_FRACTION):
        of_channel = np.flatnonzero(channel == v)
        unit = _units(rows[of_channel], v, config)
        values = numbers[of_channel]
        numbers[of_channel] = _CONVERT[v](values, unit)
        changed = (numbers[of_channel] != values) & ~np.isnan(values)
        ledger.count(f"{CHANNELS[v].name.lower()} converted", int(changed.sum()))


def _units(rows: pl.DataFrame, v: int, config: ExtractConfig) -> NDArray[np.str_]:
    """[N] the unit of each row, empty where nothing names it."""
    if config.units == "as_found" and v == OXYGEN_FRACTION:
        return np.full(len(rows), _ALWAYS_PERCENT)
    if config.units == "as_found":
        labels = {item.itemid: item.label.lower() for item in ITEMS.values() if item.channel == v}
        # The released test for Fahrenheit looks for a capital F in lower-cased text: never true.
        seen = {i: "" if v == TEMPERATURE else _named(label, v) for i, label in labels.items()}
        return _mapped(rows["itemid"], seen)
    by_text = {text: _named(text.lower(), v) for text in rows["valueuom"].unique().drop_nulls()}
    named = _mapped(rows["valueuom"], by_text)
    by_item = {
        item.itemid: item.unit for item in ITEMS.values() if item.channel == v and item.unit != "C"
    }
    return np.where(named == "", _mapped(rows["itemid"], by_item), named)


def _named(text: str, v: int) -> str:
    return next((unit for part, unit in _NAMED[v] if part in text), "")


def _mapped(column: pl.Series, mapping: dict[int, str] | dict[str, str]) -> NDArray[np.str_]:
    """Each value's image, empty where it has none."""
    units = column.replace_strict(mapping, default="", return_dtype=pl.String).fill_null("")
    return units.to_numpy().astype("U4")


def _celsius(values: NDArray[np.float64], unit: NDArray[np.str_]) -> NDArray[np.float64]:
    """Fahrenheit where the unit says so; unnamed from 79 on; a value named Celsius stays."""
    fahrenheit = (unit == "F") | ((unit != "C") & (values >= SURELY_FAHRENHEIT))
    return np.where(fahrenheit, (values - 32) * 5.0 / 9, values)


def _kilogram(values: NDArray[np.float64], unit: NDArray[np.str_]) -> NDArray[np.float64]:
    pounds = np.where(unit == "oz", values / 16.0, values)
    return np.where((unit == "oz") | (unit == "lb"), pounds * POUND_KG, pounds)


def _centimetre(values: NDArray[np.float64], unit: NDArray[np.str_]) -> NDArray[np.float64]:
    return np.where(unit == "in", np.round(values * INCH_CM), values)


def _fraction(values: NDArray[np.float64], unit: NDArray[np.str_]) -> NDArray[np.float64]:
    percent = (unit == _ALWAYS_PERCENT) | ((values > 1) & (unit != "torr"))
    return np.where(percent, values / 100.0, values)


_CONVERT: Final = {
    TEMPERATURE: _celsius,
    WEIGHT: _kilogram,
    HEIGHT: _centimetre,
    OXYGEN_FRACTION: _fraction,
}
