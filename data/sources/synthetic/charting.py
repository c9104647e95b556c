"""From the clean hourly course to charted rows: items, minutes, units, texts, quirks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from data.sources.synthetic import items
from data.sources.synthetic.people import DAY, HOUR
from data.sources.synthetic.vitals import VITALS

if TYPE_CHECKING:
    from data.sources.synthetic.config import HospitalConfig
    from data.sources.synthetic.people import Block
    from data.sources.synthetic.vitals import Course

TEXTS: tuple[str, ...] = tuple(
    dict.fromkeys(
        text
        for group in (
            *items.EYE,
            *items.MOTOR,
            *items.VERBAL,
            *items.REFILL,
            items.BAD_TEXT,
            *(texts for _, texts in items.FILLER_TEXT),
        )
        for text in group
    )
)
UNIT_TEXTS: tuple[str, ...] = tuple(dict.fromkeys(["", *items.UNITS.values(), "F", "cm", "lb"]))
FAHRENHEIT, CELSIUS = (223761, 678), (223762, 676)
_TEXT_CODE = {text: code for code, text in enumerate(TEXTS)}
_UNIT_CODE = {text: code for code, text in enumerate(UNIT_TEXTS)}


@dataclass
class Rows:
    """Event rows, flat. `text` >= 0 replaces the number by TEXTS[text]; NaN number = empty."""

    stay: np.ndarray
    time: np.ndarray  # seconds since 1970
    itemid: np.ndarray
    number: np.ndarray
    text: np.ndarray
    unit: np.ndarray  # code into UNIT_TEXTS
    delay: np.ndarray  # seconds from charttime to storetime
    bound: np.ndarray  # 0: the stay's id is written; 1: blank stay; 2: blank stay and admission

    def __len__(self) -> int:
        return len(self.stay)

    def take(self, index: np.ndarray) -> Rows:
        """The rows at these positions (or under this mask)."""
        return Rows(**{f.name: getattr(self, f.name)[index] for f in fields(Rows)})

    @classmethod
    def join(cls, parts: list[Rows]) -> Rows:
        """All rows of the parts, one after the other."""
        return cls(
            **{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)}
        )


def make_rows(
    stay: np.ndarray,
    time: np.ndarray,
    itemid: np.ndarray | int,
    number: np.ndarray,
    rng: np.random.Generator,
    text: np.ndarray | None = None,
) -> Rows:
    """Rows with the unit of their item and a storetime within the hour."""
    n = len(stay)
    item = np.broadcast_to(np.asarray(itemid, dtype=np.int64), (n,)).copy()
    ids, where = np.unique(item, return_inverse=True)
    units = np.array([_UNIT_CODE[items.UNITS.get(int(i), "")] for i in ids], dtype=np.int16)
    return Rows(
        stay=stay,
        time=time,
        itemid=item,
        number=number,
        text=np.full(n, -1, dtype=np.int16) if text is None else text.astype(np.int16),
        unit=units[where] if n else np.zeros(0, np.int16),
        delay=rng.integers(0, 55, n) * 60,
        bound=np.zeros(n, dtype=np.int8),
    )


def codes_of(texts: tuple[str, ...]) -> np.ndarray:
    """Positions in TEXTS."""
    return np.array([_TEXT_CODE[t] for t in texts], dtype=np.int16)


def vital_rows(
    block: Block, course: Course, carevue: np.ndarray, rng: np.random.Generator
) -> list[Rows]:
    """The charted hours of the vital signs; a row's time lies inside its hour."""
    minute = rng.integers(0, 55, len(block.stay))
    arterial = rng.random(len(block.stay)) < 0.4
    parts = []
    for column, vital in enumerate(VITALS):
        at = course.charted[:, column]
        stay = course.stay[at]
        time = block.intime[stay] + course.hour[at] * HOUR + (minute[stay] + column % 3) * 60 + 60
        meta, care = items.VITAL_ITEMS[vital.name]
        pair = np.where(carevue[stay, None], np.array(care), np.array(meta))
        item = np.where(arterial[stay], pair[:, 1], pair[:, 0])
        number = np.maximum(course.values[at, column], 1.0)
        if vital.name == "Temperature":
            number = np.where(np.isin(item, FAHRENHEIT), number * 1.8 + 32.0, number)
        number = np.round(number, vital.decimals)
        if vital.name == "Oxygen saturation":
            number = np.minimum(number, 100.0)
        parts.append(make_rows(stay, time, item, number, rng))
    return parts


def slow_rows(
    block: Block, course: Course, carevue: np.ndarray, rng: np.random.Generator
) -> list[Rows]:
    """What is charted every few hours or once: coma scale, FiO2, pH, refill, size."""
    s = len(block.stay)
    acuity = block.acuity[block.stay_admission]
    parts: list[Rows] = []

    def hours(every: int, share: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        at = (course.hour % every == rng.integers(0, every, s)[course.stay]) & (
            rng.random(len(course.hour)) < share
        )
        stay = course.stay[at]
        return stay, block.intime[stay] + course.hour[at] * HOUR + rng.integers(
            1, 59, len(stay)
        ) * 60

    stay, time = hours(4)
    wake = np.clip(rng.normal(0.9, 0.25, s) - 0.08 * acuity, 0.0, 1.0)[stay]
    scores = []
    for ids, scale in (
        ((220739, 184), items.EYE),
        ((223901, 454), items.MOTOR),
        ((223900, 723), items.VERBAL),
    ):
        levels = len(scale[0])
        score = np.clip(np.rint(wake * levels + rng.normal(0, 0.4, len(stay))), 1, levels)
        scores.append(score)
        code = np.where(
            carevue[stay],
            codes_of(scale[1])[score.astype(int) - 1],
            codes_of(scale[0])[score.astype(int) - 1],
        )
        item = np.where(carevue[stay], ids[1], ids[0])
        parts.append(make_rows(stay, time, item, score, rng, code))
    old = carevue[stay]
    parts.append(make_rows(stay[old], time[old], 198, sum(scores)[old], rng))

    stay, time = hours(6, 0.8)
    fio2 = np.clip(np.rint(rng.normal(45, 10, s)[stay] + rng.normal(0, 4, len(stay))), 21, 100)
    parts.append(make_rows(stay, time, np.where(carevue[stay], 3420, 223835), fio2, rng))
    stay, time = hours(8, 0.6)
    ph = np.round(rng.normal(7.38, 0.04, s)[stay] + rng.normal(0, 0.02, len(stay)), 2)
    parts.append(make_rows(stay, time, np.where(carevue[stay], 780, 223830), ph, rng))
    stay, time = hours(12, 0.5)
    slow = (rng.random(len(stay)) < 0.1).astype(int)
    code = np.where(carevue[stay], codes_of(items.REFILL[1])[slow], codes_of(items.REFILL[0])[slow])
    parts.append(
        make_rows(
            stay, time, np.where(carevue[stay], 3348, 223951), np.full(len(stay), np.nan), rng, code
        )
    )
    return [*parts, *_size_rows(block, carevue, rng)]


def _size_rows(block: Block, carevue: np.ndarray, rng: np.random.Generator) -> list[Rows]:
    stay = np.arange(len(block.stay))
    time = block.intime + 600
    male = block.male[block.stay_patient]
    centimetres = np.rint(rng.normal(np.where(male, 176, 163), 7))
    kilos = np.round(rng.normal(np.where(male, 86, 74), 12), 1)
    inch = rng.random(len(stay)) < 0.6
    pound = rng.random(len(stay)) < 0.4
    parts = []
    tall = np.where(inch, np.rint(centimetres / 2.54), centimetres)
    item = np.where(carevue, 1394, np.where(inch, 226707, 226730))
    tall = np.where(carevue, np.rint(centimetres / 2.54), tall)
    known = rng.random(len(stay)) < 0.7
    parts.append(make_rows(stay[known], time[known], item[known], tall[known], rng))
    heavy = np.where(pound, np.round(kilos / 0.453592, 1), kilos)
    item = np.where(carevue, np.where(pound, 3581, 763), np.where(pound, 226531, 226512))
    parts.append(make_rows(stay, time, item, heavy, rng))
    return parts


def filler_rows(block: Block, wanted: np.ndarray, rng: np.random.Generator) -> Rows:
    """Rows of items that are none of the 17 variables, `wanted` of them for each stay."""
    stay = np.repeat(np.arange(len(block.stay)), wanted)
    n = len(stay)
    hour = np.floor(rng.random(n) * block.hours[stay]).astype(np.int64)
    time = (block.intime[stay] + hour * HOUR) // HOUR * HOUR + HOUR
    kinds = len(items.FILLER) + len(items.FILLER_TEXT)
    kind = rng.integers(0, kinds, n)
    ids = np.array([i.itemid for i in items.FILLER] + [i.itemid for i, _ in items.FILLER_TEXT])
    number = np.round(rng.gamma(4.0, 6.0, n), 1)
    text = np.full(n, -1, dtype=np.int16)
    for offset, (_, texts) in enumerate(items.FILLER_TEXT):
        at = kind == len(items.FILLER) + offset
        codes = codes_of(texts)
        text[at] = codes[rng.integers(0, len(codes), int(at.sum()))]
        number[at] = np.nan
    return make_rows(stay, time, ids[kind], number, rng, text)


def malform(rows: Rows, block: Block, config: HospitalConfig, rng: np.random.Generator) -> Rows:
    """The real table's malformed rows, each kind in `quirk_rate` of the rows it can befall.

    No quirk moves a vital sign silently by a believable amount: a wrong value is impossible, is
    text, or carries the unit that explains it.
    """
    n, rate = len(rows), config.quirk_rate
    rows = rows.take(np.arange(n))

    def hit(where: np.ndarray | None = None, share: float = rate) -> np.ndarray:
        lot = rng.random(n) < share
        return lot if where is None else lot & where

    numeric = (rows.text < 0) & ~np.isnan(rows.number)
    fahrenheit, celsius = np.isin(rows.itemid, FAHRENHEIT), np.isin(rows.itemid, CELSIUS)
    mixed = hit(fahrenheit, 5 * rate)  # Celsius under the Fahrenheit item, no unit to tell
    rows.number[mixed] = np.round((rows.number[mixed] - 32.0) / 1.8, 1)
    rows.unit[mixed] = 0
    mixed = hit(celsius, 5 * rate)
    rows.number[mixed] = np.round(rows.number[mixed] * 1.8 + 32.0, 1)
    rows.unit[mixed] = _UNIT_CODE["F"]
    mixed = hit(np.isin(rows.itemid, (223835, 3420)), 10 * rate)
    rows.number[mixed] = rows.number[mixed] / 100.0
    mixed = hit(np.isin(rows.itemid, (226512, 763)), 10 * rate)
    rows.number[mixed] = np.round(rows.number[mixed] / 0.453592, 1)
    rows.unit[mixed] = _UNIT_CODE["lb"]
    mixed = hit(rows.itemid == 226707, 10 * rate)
    rows.number[mixed] = np.rint(rows.number[mixed] * 2.54)
    rows.unit[mixed] = _UNIT_CODE["cm"]
    mixed = hit(np.isin(rows.itemid, (220277, 646)))
    rows.number[mixed] = np.round(rows.number[mixed] / 100.0, 2)
    rows.unit[hit(share=2 * rate)] = 0
    wild = hit(numeric, rate / 2)
    rows.number[wild] = rng.choice([0.0, 9999.0, 999999.0, -1.0], int(wild.sum()))
    bad = hit(numeric, rate / 2)
    rows.text[bad] = rng.choice(codes_of(items.BAD_TEXT), int(bad.sum()))
    rows.number[bad] = np.nan
    empty = hit(numeric, rate / 5)
    rows.number[empty] = np.nan
    rows.bound[hit()] = 1
    rows.bound[hit(share=rate / 2)] = 2
    again = rows.take(hit())
    again.delay = again.delay + 3_600
    again.number = again.number + rng.integers(-1, 2, len(again)) * (again.text < 0)
    parts = [rows, again]
    outside = rows.take(hit(share=rate / 2))
    early = rng.random(len(outside)) < 0.5
    shift = rng.integers(1, 20, len(outside)) * HOUR
    outside.time = np.where(
        early, block.intime[outside.stay] - shift, block.outtime[outside.stay] + shift
    )
    far = rows.take(hit(share=rate / 5))
    far.time = far.time + 400 * DAY
    far.bound[:] = 2
    return Rows.join([*parts, outside, far])
