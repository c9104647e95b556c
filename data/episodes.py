"""Episodes given as plain tables, checked row by row: the input of `rayfuse predict`.

series.parquet or .csv: episode_id, hours, channel, value, and optionally unit; images likewise:
episode_id, path; episodes, optional: episode_id, hours. docs/export.md describes them.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from data.cleaning import RANGES
from data.duplicates import Points
from data.errors import InputError
from data.images import UnreadableImageError, is_prepared, shrink_image
from data.reader import Series
from data.schema import CHANNELS, CONTINUOUS, N_CHANNELS
from data.series import EPSILON, Grid, bin_count, discretise
from data.tasks import CHEXPERT_LABELS

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from data.tasks import TaskSpec

    Rows = NDArray[np.int64]

UNITS: Final[dict[str, str]] = {
    "Capillary refill rate": "",
    "Diastolic blood pressure": "mmHg",
    "Fraction inspired oxygen": "fraction",
    "Glascow coma scale eye opening": "",
    "Glascow coma scale motor response": "",
    "Glascow coma scale total": "",
    "Glascow coma scale verbal response": "",
    "Glucose": "mg/dL",
    "Heart Rate": "/min",
    "Height": "cm",
    "Mean blood pressure": "mmHg",
    "Oxygen saturation": "%",
    "Respiratory rate": "/min",
    "Systolic blood pressure": "mmHg",
    "Temperature": "°C",
    "Weight": "kg",
    "pH": "",
}
"""Of each channel; empty where a value is a level or has none."""
LONGEST_HOURS: Final = 8784.0
_US_PER_HOUR: Final = 3_600_000_000
_COLUMNS: Final = {
    "series": (("episode_id", "hours", "channel", "value"), ("unit",)),
    "images": (("episode_id", "path"), ()),
    "episodes": (("episode_id", "hours"), ()),
}


@dataclass(frozen=True)
class Rules:
    """How a cohort's shards were made, as far as it decides what a model sees.

    Attributes:
        timestep_hours: Width of a bin.
        clip: Values are held to `data.cleaning.RANGES`.
        image_short_side: Pixels.
    """

    timestep_hours: float
    clip: bool
    image_short_side: int


class Episodes:
    """Rows for a Packer, as a ShardReader gives them; labels are zeros.

    Attributes:
        folder: Of the tables.
        ids: [N] episode_id, sorted.
        has_ehr, has_cxr: [N] bool.
        labels: [N, C] zeros.
        cxr_labels: [N, 14] zeros.
    """

    def __init__(self, folder: Path, spec: TaskSpec, rules: Rules, *, images: bool = True) -> None:
        """Read and check the tables of a folder.

        Args:
            folder: Holds series, images, episodes.
            spec: The task: its window, and what an episode must hold.
            rules: From values to bins.
            images: Whether the model looks at them.

        Raises:
            InputError: Names file, row, column and what is wrong.
        """
        self.folder = folder
        self._rules = rules
        series, pictures, lengths = (_Table.find(folder, name) for name in _COLUMNS)
        if series is None and pictures is None:
            raise InputError(
                f"{folder}: neither series.parquet, series.csv, images.parquet nor images.csv, and "
                "no manifest.json of shards; docs/export.md describes the tables"
            )
        if series is not None and "ehr" not in spec.modalities:
            raise InputError(f"{series.path}: task {spec.name} reads images only; remove the file")
        named = [table for table in (lengths, series, pictures) if table is not None]
        self.ids = _ids(named, known=lengths)
        index = {name: row for row, name in enumerate(self.ids)}
        self.has_ehr = _holding(index, series)
        self.has_cxr = _holding(index, pictures)
        self._check_first_modality(spec)
        self._grid = _grid(series, lengths, index, spec, rules) if series is not None else None
        self._compact = np.cumsum(self.has_ehr) - 1
        self._images = _images(pictures, index, folder) if pictures is not None else {}
        self._image_file = pictures.path if pictures is not None else folder
        if not images:
            self.has_cxr = np.zeros(len(self.ids), bool)
        self.labels = np.zeros((len(self.ids), len(spec.labels)), np.float32)
        self.cxr_labels = np.zeros((len(self.ids), len(CHEXPERT_LABELS)), np.float32)

    def __len__(self) -> int:
        """Episodes."""
        return len(self.ids)

    def series(self, rows: Rows, max_steps: int | None = None) -> Series:
        """The series of `rows`, each cut to its first `max_steps` bins."""
        values = [np.zeros((0, N_CHANNELS), np.float32)]
        observed = [np.zeros((0, N_CHANNELS), np.uint8)]
        for row in rows.tolist():
            first, last = self._span(row, max_steps)
            if self._grid is not None and last > first:
                values.append(self._grid.values[first:last])
                observed.append(self._grid.observed[first:last])
        spans = [self._span(row, max_steps) for row in rows.tolist()]
        lengths = np.array([last - first for first, last in spans], np.int64)
        return Series(np.concatenate(values), np.concatenate(observed), lengths)

    def image(self, row: int) -> bytes:
        """The grey JPEG of a row that has an image, made as an extraction makes it.

        Raises:
            InputError: It cannot be read.
        """
        number, path = self._images[row]
        short_side = self._rules.image_short_side
        try:
            raw = path.read_bytes()
            return raw if is_prepared(raw, short_side) else shrink_image(raw, short_side)[0]
        except (UnreadableImageError, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise InputError(
                f"{self._image_file}: row {number}, column path: {path}: {why}; give a JPEG or PNG"
            ) from None

    def _span(self, row: int, max_steps: int | None) -> tuple[int, int]:
        if self._grid is None or not self.has_ehr[row]:
            return 0, 0
        place = self._compact[row]
        first, last = int(self._grid.first[place]), int(self._grid.first[place + 1])
        return first, last if max_steps is None else min(last, first + max_steps)

    def _check_first_modality(self, spec: TaskSpec) -> None:
        holds, table = (
            (self.has_ehr, "series") if spec.modalities[0] == "ehr" else (self.has_cxr, "images")
        )
        if not holds.all():
            lacking = self.ids[int(np.argmin(holds))]
            raise InputError(
                f"{self.folder}: episode {lacking!r} has no row in {table}, which "
                f"task {spec.name} needs of each; add one, or leave the episode out"
            )


@dataclass(frozen=True)
class _Table:
    """One file, every column as text; rows are counted from 1, the header apart."""

    path: Path
    rows: pl.DataFrame

    @classmethod
    def find(cls, folder: Path, name: str) -> _Table | None:
        found = [folder / f"{name}{suffix}" for suffix in (".parquet", ".csv")]
        there = [path for path in found if path.is_file()]
        if len(there) > 1:
            raise InputError(f"{folder}: both {name}.parquet and {name}.csv; remove one")
        return cls.read(there[0], *_COLUMNS[name]) if there else None

    @classmethod
    def read(cls, path: Path, needed: tuple[str, ...], optional: tuple[str, ...]) -> _Table:
        try:
            rows = (
                pl.read_parquet(path)
                if path.suffix == ".parquet"
                else pl.read_csv(path, infer_schema=False)
            )
        except (pl.exceptions.PolarsError, OSError) as error:
            raise InputError(f"{path}: cannot be read ({error})") from None
        known = (*needed, *optional)
        for column in rows.columns:
            if column not in known:
                close = difflib.get_close_matches(column, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}"
                raise InputError(f"{path}: unknown column {column!r}; {hint}")
        for column in needed:
            if column not in rows.columns:
                raise InputError(f"{path}: column {column!r} is missing")
        if not rows.height:
            raise InputError(f"{path}: no row in it")
        try:
            text = rows.select(pl.all().cast(pl.String).str.strip_chars())
        except pl.exceptions.PolarsError as error:
            raise InputError(f"{path}: a column is neither text nor number ({error})") from None
        table = cls(path, text)
        for column in needed:
            empty = text[column].is_null() | (text[column] == "")
            table.refuse(empty.to_numpy(), column, "empty; give a value, or leave the row out")
        return table

    def refuse(self, bad: NDArray[np.bool_], column: str, why: str) -> None:
        """Raise for the first bad row ([N] bool)."""
        if bad.any():
            row = int(np.argmax(bad))
            value = self.rows[column][row]
            raise InputError(f"{self.path}: row {row + 1}, column {column}: {value!r}: {why}")

    def numbers(self, column: str) -> NDArray[np.float64]:
        """[N], NaN where the text is no finite number."""
        number = self.rows[column].cast(pl.Float64, strict=False).fill_null(np.nan)
        values = number.to_numpy().copy()
        values[~np.isfinite(values)] = np.nan
        return values

    def hours(self) -> NDArray[np.float64]:
        """[N] hours since admission."""
        hours = self.numbers("hours")
        self.refuse(np.isnan(hours), "hours", "no number; hours since admission, e.g. 3.5")
        self.refuse(hours < 0, "hours", "before admission; give hours since admission")
        late = hours > LONGEST_HOURS
        self.refuse(late, "hours", "more than a year; is it in hours since admission?")
        return hours


def _ids(named: list[_Table], known: _Table | None) -> tuple[str, ...]:
    if known is not None:
        repeated = known.rows["episode_id"].is_duplicated().to_numpy()
        known.refuse(repeated, "episode_id", "comes twice; give one row for each episode")
        for table in named:
            foreign = ~table.rows["episode_id"].is_in(known.rows["episode_id"].implode())
            why = f"not in {known.path.name}; add it there, or leave the row out"
            table.refuse(foreign.to_numpy(), "episode_id", why)
        return tuple(sorted(known.rows["episode_id"].to_list()))
    return tuple(sorted({one for table in named for one in table.rows["episode_id"].to_list()}))


def _holding(index: dict[str, int], table: _Table | None) -> NDArray[np.bool_]:
    held = np.zeros(len(index), bool)
    if table is not None:
        held[[index[one] for one in table.rows["episode_id"].unique().to_list()]] = True
    return held


def _grid(
    table: _Table, lengths: _Table | None, index: dict[str, int], spec: TaskSpec, rules: Rules
) -> Grid:
    """The series of the episodes that have one, in the order of their ids."""
    hours, channel = table.hours(), _channels(table)
    number = _values(table, channel, rules)
    present = sorted({index[one] for one in table.rows["episode_id"].to_list()})
    place = {row: compact for compact, row in enumerate(present)}
    stay = np.array([place[index[one]] for one in table.rows["episode_id"].to_list()], np.int64)
    known = (
        dict(zip(lengths.rows["episode_id"].to_list(), lengths.hours().tolist(), strict=True))
        if lengths is not None
        else {}
    )
    names = list(index)
    ends = np.array([known.get(names[row], np.nan) for row in present])
    _refuse_late(table, hours, ends[stay], spec)
    last = np.zeros(len(present))
    np.maximum.at(last, stay, hours)
    whole = spec.window_hours if spec.min_los_hours == spec.window_hours else None
    ends = np.where(np.isnan(ends), last if whole is None else whole, ends)
    if spec.window_hours is not None:
        ends = np.minimum(ends, spec.window_hours)
    offset = np.round(hours * _US_PER_HOUR).astype(np.int64)
    order = np.lexsort((offset, channel, stay))
    same = np.zeros(len(order), bool)
    keys = np.stack([stay, channel, offset])[:, order]
    same[order[1:]] = (keys[:, 1:] == keys[:, :-1]).all(0)
    table.refuse(same, "hours", "a second value of this channel at this time; give one")
    points = Points(stay[order], channel[order], offset[order], number[order], offset[order])
    return discretise(points, bin_count(ends, rules.timestep_hours), rules.timestep_hours)


def _refuse_late(
    table: _Table, hours: NDArray[np.float64], ends: NDArray[np.float64], spec: TaskSpec
) -> None:
    if spec.window_hours is not None:
        why = f"task {spec.name} predicts at {spec.window_hours:g} h; leave later values out"
        table.refuse(hours > spec.window_hours + EPSILON, "hours", why)
    after = hours > np.nan_to_num(ends, nan=np.inf) + EPSILON
    table.refuse(after, "hours", "after the episode's end in the table of episodes")


def _channels(table: _Table) -> Rows:
    index = {channel.name: v for v, channel in enumerate(CHANNELS)}
    column = table.rows["channel"]
    unknown = ~column.is_in(list(index))
    if unknown.any():
        lowered = {name.lower(): name for name in index}
        close = difflib.get_close_matches(column.filter(unknown)[0].lower(), lowered, n=1)
        hint = f"did you mean {lowered[close[0]]!r}?" if close else f"it is one of {list(index)}"
        table.refuse(unknown.to_numpy(), "channel", f"unknown; {hint}")
    return np.array([index[name] for name in column.to_list()], np.int64)


def _values(table: _Table, channel: Rows, rules: Rules) -> NDArray[np.float64]:
    """[N] numbers, or indices of levels; held to the ranges as an extraction holds them."""
    number = table.numbers("value")
    for v, described in enumerate(CHANNELS):
        of_channel = channel == v
        unit = UNITS[described.name]
        if "unit" in table.rows.columns:
            other = table.rows["unit"].fill_null(unit).to_numpy() != unit
            why = f"{described.name} is in {unit or 'no unit'}; convert it"
            table.refuse(of_channel & other, "unit", why)
        if v not in CONTINUOUS:
            number[of_channel] = _levels(table, of_channel, v, number[of_channel])
            continue
        table.refuse(of_channel & np.isnan(number), "value", f"no number; {described.name} is one")
        if rules.clip:
            lowest, low, high, highest = RANGES[described.name]
            outside = of_channel & ((number < lowest) | (number > highest))
            why = f"{described.name} lies within {lowest:g} to {highest:g} {unit}; is it in {unit}?"
            table.refuse(outside, "value", why if unit else why.split(";")[0])
            number[of_channel] = np.clip(number[of_channel], low, high)
    return number


def _levels(
    table: _Table, of_channel: NDArray[np.bool_], v: int, number: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[n] the index of each level; a level that is a number may be written as another one."""
    levels = CHANNELS[v].levels
    by_text = {level: float(place) for place, level in enumerate(levels)}
    by_number = {float(level): place for level, place in by_text.items() if _is_number(level)}
    texts = table.rows["value"].filter(pl.Series(of_channel)).to_list()
    found = np.array(
        [
            by_text.get(text, by_number.get(value, np.nan))
            for text, value in zip(texts, number.tolist(), strict=True)
        ]
    )
    bad = np.zeros(len(of_channel), bool)
    bad[of_channel] = np.isnan(found)
    table.refuse(bad, "value", f"no level of {CHANNELS[v].name}; it has {', '.join(levels)}")
    return found


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _images(table: _Table, index: dict[str, int], folder: Path) -> dict[int, tuple[int, Path]]:
    """Row -> the table's row that names its image, and the file."""
    several = table.rows["episode_id"].is_duplicated().to_numpy()
    table.refuse(several, "episode_id", "several images; give the one that is to be used")
    paths = [folder / text for text in table.rows["path"].to_list()]
    absent = np.array([not path.is_file() for path in paths])
    table.refuse(absent, "path", f"no such file (looked up from {folder})")
    names = table.rows["episode_id"].to_list()
    return {index[name]: (row + 1, paths[row]) for row, name in enumerate(names)}
