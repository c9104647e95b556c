"""Blocks of a CSV: nothing lost, no record cut, every damage named."""

from __future__ import annotations

import csv
import gzip
import io
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InputError
from data.sources.blocks import _cut, iter_blocks, read_header

if TYPE_CHECKING:
    from pathlib import Path

FIELD = st.text(st.sampled_from('ab,"\n 1'), max_size=6)


def _written(rows: list[list[str]]) -> bytes:
    stream = io.StringIO()
    csv.writer(stream, quoting=csv.QUOTE_MINIMAL, lineterminator="\n").writerows(rows)
    return stream.getvalue().encode()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=20), st.integers(1, 60))
def test_every_block_holds_whole_records(rows: list[tuple[str, str]], size: int) -> None:
    from pathlib import Path

    body = _written([list(row) for row in rows])
    content = b"x,y\n" + body
    chunks = iter([content[i : i + 3] for i in range(0, len(content), 3)])
    blocks = list(_cut(Path("t.csv"), chunks, size))
    parsed = [row for block in blocks for row in csv.reader(io.StringIO(block.content.decode()))]
    assert parsed == list(csv.reader(io.StringIO(body.decode())))
    if b"".join(block.content for block in blocks) == body:
        lines = 1
        for block in blocks:
            assert block.lines_before == lines
            lines += block.content.count(b"\n")


def test_blocks_are_small_and_many(tmp_path: Path) -> None:
    content = b"a,b\n" + b"".join(b"%d,text\n" % i for i in range(20_000))
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(content))
    blocks = list(iter_blocks(path, block_bytes=5_000))
    assert b"".join(block.content for block in blocks) == content.partition(b"\n")[2]
    assert [block.lines_before for block in blocks[:1]] == [1]


def test_members_of_a_gzip_follow_each_other(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(b"a\n1\n") + gzip.compress(b"2\n") + b"\0" * 512)
    assert b"".join(block.content for block in iter_blocks(path)) == b"1\n2\n"


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_a_truncated_gzip_is_named(tmp_path: Path, kept: float) -> None:
    content = gzip.compress(b"a,b\n" + b"".join(b"%d,%d\n" % (i, i * i) for i in range(9_000)))
    path = tmp_path / "chartevents.csv.gz"
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(InputError, match=r"chartevents\.csv\.gz: truncated gzip.*download"):
        list(iter_blocks(path))


def test_a_damaged_gzip_is_named(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(b"a,b\n" + b"".join(b"%d,9\n" % i for i in range(9_000))))
    content[-6] ^= 0xFF
    path = tmp_path / "t.csv.gz"
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match="damaged gzip"):
        list(iter_blocks(path))


def test_a_file_that_only_claims_to_be_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    path.write_bytes(b"subject_id,hadm_id\n1,2\n")
    with pytest.raises(InputError, match="damaged gzip"):
        read_header(path)


def test_an_unclosed_quote_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b'a,b\n1,2\n3,"open\n4,5\n')
    with pytest.raises(InputError, match="never closed"):
        list(iter_blocks(path))


def test_header_without_byte_order_mark_or_carriage_return(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbfA,B\r\n1,2\r\n")
    assert read_header(path) == "A,B"


@pytest.mark.parametrize(("content", "reason"), [(b"", "empty"), (b"a,\xff\n1,2\n", "UTF-8")])
def test_a_bad_header_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        read_header(path)
