"""Raw tables into typed canonical frames, a bounded block at a time.

Every CSV field is parsed as text and only the rows of needed items and subjects are converted:
most rows of the event tables belong to other items, and text costs the least. `None` is a value
(a level of GCS eye opening); only the empty field is null.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import polars as pl

from data.errors import InputError
from data.sources.blocks import BLOCK_BYTES, Block, iter_blocks
from data.sources.canonical import TABLES, TIME

if TYPE_CHECKING:
    from collections.abc import Iterator

    from data.sources.layout import TableSpec
    from data.sources.release import TableFile

_BATCH_ROWS: Final = 1 << 20
_TIME_FORMATS: Final = (
    "%Y-%m-%d %H:%M:%S",
    "%Y-%m-%d",
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%d %H:%M",
)
_LENIENT: Final = ("valuenum",)
"""Numbers that hold text in real tables: null and counted, the text is in `value`."""


class TableReader:
    """Streams one raw table; after `frames` is exhausted, `rows` and `repairs` are final.

    Attributes:
        rows: Lines read, the header not counted.
        repairs: Counted conversions that gave null.
    """

    def __init__(
        self,
        file: TableFile,
        spec: TableSpec,
        *,
        items: frozenset[int] | None = None,
        subjects: pl.Series | None = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        """Prepare to read.

        Args:
            file: Where the table lies.
            spec: How it becomes canonical; `file` has its columns.
            items: Keep only rows of these item ids; None keeps all.
            subjects: Keep only rows of these subjects; None keeps all.
            block_bytes: Inflated bytes parsed at a time.
        """
        self.rows = 0
        self.repairs: dict[str, int] = {}
        self._file = file
        self._spec = spec
        self._items = None if items is None else pl.Series(sorted(items), dtype=pl.Int64)
        self._subjects = subjects
        self._block_bytes = block_bytes
        self._written = {
            canonical: written
            for canonical, names in spec.columns.items()
            if (written := file.written(names)) is not None
        }

    def frames(self) -> Iterator[pl.DataFrame]:
        """Canonical frames in file order; some may be empty.

        Raises:
            InputError: A fault of the file; the message names its row and column.
        """
        for raw in self._parquet() if self._file.is_parquet else self._csv():
            yield self._canonical(raw)

    def _csv(self) -> Iterator[pl.DataFrame]:
        for block in iter_blocks(self._file.path, self._block_bytes):
            try:
                frame = self._needed(self._scan(block, self._text_schema())).collect()
            except pl.exceptions.PolarsError as error:
                raise self._csv_fault(block, error) from None
            if not block.has_fields(len(self._file.columns)):
                self._refuse_ragged(block)
            self.rows = block.lines_before - 1 + block.content.count(b"\n")
            self.rows += not block.content.endswith(b"\n")
            yield frame

    def _text_schema(self) -> dict[str, type[pl.DataType]]:
        schema: dict[str, type[pl.DataType]] = dict.fromkeys(self._file.columns, pl.String)
        if self._items is not None:
            schema[self._written["itemid"]] = pl.Int64
        return schema

    def _scan(self, block: Block, schema: dict[str, type[pl.DataType]]) -> pl.LazyFrame:
        return pl.scan_csv(
            block.content,
            has_header=False,
            schema=schema,
            row_index_name="__row",
            row_index_offset=block.lines_before,
        )

    def _needed(self, rows: pl.LazyFrame) -> pl.LazyFrame:
        """The columns under canonical names, and only the needed items."""
        chosen = rows.select(
            pl.col("__row").cast(pl.Int64).alias("row"),
            *(pl.col(written).alias(canonical) for canonical, written in self._written.items()),
        )
        if self._items is None:
            return chosen
        return chosen.filter(pl.col("itemid").is_in(self._items.implode()))

    def _parquet(self) -> Iterator[pl.DataFrame]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = list(self._written.values())
        try:
            with pq.ParquetFile(self._file.path) as source:
                for batch in source.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                    frame = pl.DataFrame(pa.Table.from_batches([batch]))
                    yield self._parquet_rows(frame)
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{self._file.path}: damaged Parquet after row {self.rows} ({error}); "
                "copy or write the file again"
            ) from None

    def _parquet_rows(self, frame: pl.DataFrame) -> pl.DataFrame:
        indexed = frame.with_row_index("__row", offset=self.rows + 1)
        self.rows += frame.height
        if self._items is not None:
            itemid = self._written["itemid"]
            values = self._converted(indexed[itemid], pl.Int64, "itemid", indexed["__row"])
            indexed = indexed.with_columns(values.alias(itemid))
        return self._needed(indexed.lazy()).collect()

    def _canonical(self, raw: pl.DataFrame) -> pl.DataFrame:
        """Typed, in the canonical order, without rows of other subjects."""
        schema = TABLES[self._spec.into]
        if "subject_id" in raw.columns:
            subject = self._converted(raw["subject_id"], pl.Int64, "subject_id", raw["row"])
            raw = raw.with_columns(subject)
            if self._subjects is not None:
                raw = raw.filter(pl.col("subject_id").is_in(self._subjects.implode()))
        typed = {
            name: self._converted(raw[name], kind, name, raw["row"])
            for name, kind in schema.items()
            if name in raw.columns
        }
        constants = {**self._spec.constants}
        if self._spec.source is not None:
            constants["source"] = self._spec.source
        return pl.DataFrame(typed).select(
            pl.col(name) if name in typed else pl.lit(constants.get(name), dtype=kind).alias(name)
            for name, kind in schema.items()
        )

    def _converted(
        self,
        values: pl.Series,
        kind: pl.DataType | type[pl.DataType],
        name: str,
        rows: pl.Series,
    ) -> pl.Series:
        if values.dtype == kind:
            return values
        if kind == TIME:
            converted = _as_time(values)
        elif kind == pl.Boolean:
            converted = _as_flag(values)
        elif kind.is_integer():
            converted = _as_integer(values, kind)
        else:
            converted = values.cast(kind, strict=False)
        lost = converted.null_count() - values.null_count()
        if lost and name in _LENIENT:
            label = f"{self._spec.table}: {name} is no number"
            self.repairs[label] = self.repairs.get(label, 0) + lost
        elif lost:
            raise self._unreadable(values, converted, name, rows, kind)
        return converted

    def _unreadable(
        self,
        values: pl.Series,
        converted: pl.Series,
        name: str,
        rows: pl.Series,
        kind: pl.DataType | type[pl.DataType],
    ) -> InputError:
        first = (converted.is_null() & values.is_not_null()).arg_max() or 0
        written = self._written[name]
        what = "a time like 2150-01-31 23:59:00" if kind == TIME else f"of type {kind}"
        return InputError(
            f"{self._file.path}: row {rows[first]}: column {written} holds "
            f"{str(values[first])[:40]!r}, which is not {what}; mend or remove that row"
        )

    def _csv_fault(self, block: Block, error: pl.exceptions.PolarsError) -> InputError:
        """Where in the block the parser stopped, and why."""
        path, before = self._file.path, block.lines_before
        try:
            block.content.decode("utf-8")
        except UnicodeDecodeError as wrong:
            line = before + block.content.count(b"\n", 0, wrong.start) + 1
            return InputError(
                f"{path}: line {line} is not UTF-8 text (byte {hex(block.content[wrong.start])});"
                " convert the file to UTF-8"
            )
        self._refuse_ragged(block)
        text = self._scan(block, dict.fromkeys(self._file.columns, pl.String)).collect()
        itemid = self._written["itemid"]
        converted = text[itemid].cast(pl.Int64, strict=False)
        if converted.null_count() > text[itemid].null_count():
            return self._unreadable(text[itemid], converted, "itemid", text["__row"], pl.Int64())
        return InputError(
            f"{path}: lines after {before} cannot be parsed ({str(error)[:120]}); "
            "download the file again"
        )

    def _refuse_ragged(self, block: Block) -> None:
        """Name the first record that has not the header's number of fields; blank lines pass."""
        import csv
        import io

        width = len(self._file.columns)
        records = csv.reader(io.StringIO(block.content.decode("utf-8")))
        for record in records:
            if record and len(record) != width:
                mend = (
                    "quote the field that holds a comma"
                    if len(record) > width
                    else "the line is cut off or was edited, copy the file again"
                )
                raise InputError(
                    f"{self._file.path}: line {block.lines_before + records.line_num} has "
                    f"{len(record)} fields, but the header {width}; {mend}"
                )


def read_whole(reader: TableReader) -> pl.DataFrame:
    """All frames of a small table as one."""
    empty = pl.DataFrame(schema=TABLES[reader._spec.into])
    return pl.concat([empty, *reader.frames()])


def refuse_repeated_keys(frame: pl.DataFrame, file: TableFile, key: str) -> None:
    """Refuse two different rows of one key; identical rows are left to the cohort to count.

    Raises:
        InputError: Naming the file, the key and its column.
    """
    distinct = frame.unique()
    clash = distinct.filter(pl.col(key).is_duplicated())[key]
    if len(clash):
        first = clash.sort().to_list()[0]
        rows = (frame[key] == first).arg_true() + 1
        raise InputError(
            f"{file.path}: rows {', '.join(map(str, rows.head(5)))}: different rows with {key} "
            f"{first}, which must be unique; keep one of them"
        )


def column_values(file: TableFile, written: str) -> set[str]:
    """The distinct texts of one column of a small table."""
    if file.is_parquet:
        values = pl.read_parquet(file.path, columns=[written])[written]
        return set(values.cast(pl.String).drop_nulls().unique())
    found: set[str] = set()
    for block in iter_blocks(file.path):
        schema = dict.fromkeys(file.columns, pl.String)
        values = pl.read_csv(block.content, has_header=False, schema=schema)[written]
        found.update(values.drop_nulls().unique())
    return found


def _as_time(values: pl.Series) -> pl.Series:
    """Datetimes; what no format reads is null."""
    if values.dtype != pl.String:
        return values.cast(TIME, strict=False)
    parsed = values.str.to_datetime(_TIME_FORMATS[0], time_unit="us", strict=False)
    for other in _TIME_FORMATS[1:]:
        if parsed.null_count() == values.null_count():
            break
        parsed = parsed.fill_null(values.str.to_datetime(other, time_unit="us", strict=False))
    return parsed


def _as_flag(values: pl.Series) -> pl.Series:
    """0 and 1 as booleans."""
    number = values.cast(pl.Float64, strict=False)
    return pl.select(
        pl.when(number == 1.0).then(True).when(number == 0.0).then(False).alias(values.name)
    ).to_series()


def _as_integer(values: pl.Series, kind: pl.DataType | type[pl.DataType]) -> pl.Series:
    """Integers; `12.0`, which pandas writes beside missing ids, is 12."""
    whole = values.cast(kind, strict=False)
    if whole.null_count() == values.null_count():
        return whole
    number = values.cast(pl.Float64, strict=False)
    return whole.fill_null(number.set(number != number.floor(), None).cast(kind, strict=False))
