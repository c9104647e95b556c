"""Bytes of a CSV file, gzipped or not, in big blocks that end where a record ends."""

from __future__ import annotations

import queue
import threading
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCK_BYTES = 8 << 20
_READ_BYTES = 2 << 20
_RECORD_LIMIT = 64 << 20


@dataclass(frozen=True)
class Block:
    """Whole records of a CSV file.

    Attributes:
        content: The bytes, without the header line.
        lines_before: Lines of the file before the first byte, the header counted.
    """

    content: bytes
    lines_before: int

    def has_fields(self, width: int) -> bool:
        """Whether there are as many commas outside quotes as records of `width` fields have."""
        commas, ends = _count(self.content, b","), _count(self.content, b"\n")
        ends += not self.content.endswith(b"\n")
        for quoted in self.content.split(b'"')[1::2]:
            commas -= quoted.count(b",")
            ends -= quoted.count(b"\n")
        return commas == ends * (width - 1)


def _count(content: bytes, byte: bytes) -> int:
    return int(np.count_nonzero(np.frombuffer(content, np.uint8) == byte[0]))


def read_header(path: Path) -> str:
    """The first line of a CSV file, without its line end or byte order mark.

    Raises:
        InputError: The file is empty, no gzip though named so, or its header is not UTF-8.
    """
    with _chunks(path, _READ_BYTES // 32) as chunks:
        start = b""
        for chunk in chunks:
            start += chunk
            if b"\n" in start or len(start) > _READ_BYTES:
                break
    line = start.split(b"\n", 1)[0].rstrip(b"\r").removeprefix(b"\xef\xbb\xbf")
    if not line.strip():
        raise InputError(f"{path}: empty, no header line; download the file again")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: line 1 is not UTF-8 text ({error.reason}); convert the file to UTF-8"
        ) from None


def iter_blocks(path: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Stream a file once, inflating in a thread of its own; memory is a few blocks.

    A line end inside quotes does not end a block: the quotes up to the cut are even.

    Raises:
        InputError: A truncated or damaged gzip, a quote that is never closed.
    """
    with _chunks(path, min(_READ_BYTES, block_bytes)) as chunks:
        for block in _ahead(_cut(path, chunks, block_bytes)):
            if isinstance(block, BaseException):
                raise block
            yield block


def _cut(path: Path, chunks: Iterator[bytes], block_bytes: int) -> Iterator[Block]:
    pending: list[bytes] = []
    size, lines, header = 0, 0, True
    for chunk in chunks:
        pending.append(chunk)
        size += len(chunk)
        if size < block_bytes:
            continue
        content = b"".join(pending)
        end = _record_end(content)
        if end == 0:
            if size > block_bytes + _RECORD_LIMIT:
                raise _unclosed(path, lines)
            pending = [content]
            continue
        whole, pending = content[:end], [content[end:]]
        size = len(pending[0])
        yield from _without_header(whole, lines, header)
        lines, header = lines + whole.count(b"\n"), False
    rest = b"".join(pending)
    if rest.count(b'"') % 2:
        raise _unclosed(path, lines)
    yield from _without_header(rest, lines, header)


def _without_header(content: bytes, lines: int, header: bool) -> Iterator[Block]:
    if header:
        content, lines = content.partition(b"\n")[2], lines + 1
    if content.strip():
        yield Block(content, lines)


def _record_end(content: bytes) -> int:
    """Just after the last line end with an even number of quotes before it; 0 without one."""
    end = content.rfind(b"\n") + 1
    odd = content.count(b'"', 0, end) % 2 == 1
    while end and odd:
        before = content.rfind(b"\n", 0, end - 1) + 1
        odd ^= content.count(b'"', before, end) % 2 == 1
        end = before
    return end


def _unclosed(path: Path, lines: int) -> InputError:
    return InputError(
        f"{path}: a quote opened after line {lines} is never closed; "
        "the file is damaged or cut short, download it again"
    )


@contextmanager
def _chunks(path: Path, read_bytes: int) -> Iterator[Iterator[bytes]]:
    with path.open("rb") as handle:
        raw = iter(lambda: handle.read(read_bytes), b"")
        yield _inflate(path, raw, 4 * read_bytes) if path.suffix == ".gz" else raw


def _inflate(path: Path, raw: Iterator[bytes], at_most: int) -> Iterator[bytes]:
    """Every member of a gzip file, a bounded piece at a time; zlib verifies length and checksum."""
    member, opened, empty = zlib.decompressobj(31), False, True
    try:
        for compressed in raw:
            data = compressed
            while data:
                opened, empty = True, False
                yield member.decompress(data, at_most)
                data = member.unconsumed_tail
                if member.eof:
                    data = member.unused_data.lstrip(b"\0")
                    member, opened = zlib.decompressobj(31), False
    except zlib.error as error:
        raise InputError(f"{path}: damaged gzip ({error}); download the file again") from None
    if opened or empty:
        raise InputError(f"{path}: truncated gzip, its end is missing; download the file again")


def _ahead(blocks: Iterator[Block]) -> Iterator[Block | BaseException]:
    """The same blocks, the next one made while this one is used."""
    waiting: queue.Queue[Block | BaseException | None] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def put(item: Block | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        try:
            for block in blocks:
                if not put(block):
                    return
            put(None)
        except BaseException as error:
            put(error)

    producer = threading.Thread(target=produce, name="inflate", daemon=True)
    producer.start()
    try:
        while (item := waiting.get()) is not None:
            yield item
    finally:
        stopped.set()
        producer.join()
