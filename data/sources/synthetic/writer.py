"""Gzipped CSV tables that grow block by block."""

from __future__ import annotations

import gzip
from contextlib import ExitStack
from typing import TYPE_CHECKING

import polars as pl

from data.files import atomic_path

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    import numpy as np

TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


class Tables:
    """Open tables under a folder; each appears whole when the block ends without an exception.

    The gzip header holds no time and no name, so equal rows are equal bytes.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: dict[str, gzip.GzipFile] = {}
        self._columns: dict[str, list[str]] = {}
        self._stack = ExitStack()
        self.rows: dict[str, int] = {}
        self.subjects: np.ndarray | None = None
        """Rows of other subjects are left out: the last block may be cut short."""

    def __enter__(self) -> Tables:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def append(self, name: str, frame: pl.DataFrame) -> None:
        """Add rows to `name` (a path under the folder); the first call writes the header.

        Only rows of `subjects` are written, where the table has a subject.

        Raises:
            ValueError: The columns are not those of the first call.
        """
        subject = next((c for c in frame.columns if c.lower() == "subject_id"), None)
        if subject is not None and self.subjects is not None:
            frame = frame.filter(pl.col(subject).is_in(self.subjects.tolist()))
        first = name not in self._open
        if first:
            path = self._stack.enter_context(atomic_path(self._root / name))
            raw = self._stack.enter_context(path.open("wb"))
            self._open[name] = self._stack.enter_context(
                gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=raw, mtime=0)
            )
            self._columns[name] = frame.columns
            self.rows[name] = 0
        if frame.columns != self._columns[name]:
            raise ValueError(f"{name}: columns {frame.columns} after {self._columns[name]}")
        self.rows[name] += frame.height
        text = frame.write_csv(None, include_header=first, datetime_format=TIME_FORMAT)
        self._open[name].write(text.encode())


def times(seconds: np.ndarray) -> pl.Series:
    """Seconds since 1970 as a time column."""
    return (pl.Series(seconds).cast(pl.Int64) * 1_000_000).cast(pl.Datetime("us"))
