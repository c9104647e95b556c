"""Vectors of texts on a disk, each by what decides it: base, trained weights, options, the text.

    STORE/served.json                         whose vectors a run reads
    STORE/rows-<hash>.safetensors             which extractor a row's vector is of (out of fold)
    STORE/<extractor>/extractor.json          what its vectors depend on
    STORE/<extractor>/<hash>.safetensors      hashes of some texts, and their vectors

No text is in it. Every file is whole or absent and carries a hash.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from data.errors import InputError
from data.files import PRIVATE, sha256_json, write_json
from fusion.hashed import DamagedError, digest, read_hashed, write_hashed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fusion.encoders.text import TextOptions

FORMAT: Final = 1
"""Part of every key: raise the number when the encoder's code gives other vectors."""
SERVED: Final = "served.json"
EXTRACTOR: Final = "extractor.json"
DECISIVE: Final = (
    "text",
    "backbone",
    "revision",
    "random_weights",
    "max_length",
    "pad_token",
    "adapter",
    "rank",
    "alpha",
    "target_modules",
    "base_precision",
)
"""Options that decide a text's tokens and vector. `layout` does not: packed or padded, they are
equal."""
_PRIVATE_FOLDER: Final = 0o700
_KEY_BYTES: Final = 32


def text_key(note: str, labs: str) -> bytes:
    """The SHA-256 of what is read of a row."""
    head = note.encode()
    return hashlib.sha256(b"%d:" % len(head) + head + labs.encode()).digest()


def template(options: TextOptions) -> dict[str, Any]:
    """The decisive options; of the backbone the last part of its name, wherever it lies."""
    values = options.model_dump(mode="json", include=set(DECISIVE))
    return {**values, "backbone": Path(options.backbone).name}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT


RecordT = TypeVar("RecordT", bound=_Record)


class Extractor(_Record):
    """What decides the vectors of one trained text encoder."""

    options: dict[str, Any]
    """Of `template`."""
    precision: str
    """Of its run's passes."""
    base_sha256: str | None
    """Of the base's configuration and weights; None where they were drawn."""
    tokenizer_sha256: str
    """Of its tokenizer's files."""
    weights_sha256: str
    """Of what the run trained: adapters, or all."""

    @property
    def key(self) -> str:
        """Its folder's name."""
        return sha256_json(self.model_dump(mode="json"))[:32]


class Served(_Record):
    """Whose vectors a run of the store reads."""

    extractors: tuple[str, ...]
    """Keys. The first one's, but of rows that `rows` gives to another."""
    rows: str | None = None
    """Hash of the table of rows by extractor; None where there is one extractor."""
    command: str
    """That computes what is missing."""

    @property
    def sha256(self) -> str:
        """Of what is read, whatever the command was."""
        return sha256_json(self.model_dump(mode="json", exclude={"command"}))


@dataclass(frozen=True)
class Kept:
    """A text's vector.

    Attributes:
        vector: [D] float32.
        length: Tokens it was computed from; 0 for a text without any.
        note_cut: Tokens of the note that were left out.
        labs_cut: Tokens of the sentence of results that were left out.
    """

    vector: Tensor
    length: int
    note_cut: int
    labs_cut: int


class Shelf:
    """The vectors of one extractor.

    Attributes:
        damaged: Files that are not whole, and why; their vectors are absent.
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder of an extractor; without one, the shelf is empty."""
        self.damaged: dict[Path, str] = {}
        self._folder = folder
        self._parts: list[tuple[Tensor, list[list[int]]]] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                self._take(read_hashed(path))
            except DamagedError as fault:
                self.damaged[path] = str(fault)

    def __contains__(self, key: bytes) -> bool:
        """Whether it has a text's vector."""
        return key in self._places

    def __len__(self) -> int:
        """Texts."""
        return len(self._places)

    def __getitem__(self, key: bytes) -> Kept:
        """A text's vector.

        Raises:
            KeyError: It is not here.
        """
        part, row = self._places[key]
        vectors, counts = self._parts[part]
        return Kept(vectors[row], *counts[row])

    @property
    def width(self) -> int | None:
        """D; None while it is empty."""
        return self._parts[0][0].shape[1] if self._parts else None

    def add(self, keys: Sequence[bytes], vectors: Tensor, counts: Tensor) -> None:
        """Keep the vectors of some texts, in one file.

        Args:
            keys: N keys.
            vectors: [N, D] float32.
            counts: [N, 3] int32: tokens, tokens of the note and of the results that were cut.

        Raises:
            OSError: It cannot be written.
        """
        joined = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8)
        tensors = {
            "keys": joined.view(len(keys), _KEY_BYTES),
            "vectors": vectors.contiguous(),
            "counts": counts.contiguous(),
        }
        name = hashlib.sha256(b"".join(sorted(keys))).hexdigest()[:32]
        write_hashed(self._folder / f"{name}.safetensors", tensors)
        self._take(tensors)

    def _take(self, tensors: dict[str, Tensor]) -> None:
        number = len(self._parts)
        self._parts.append((tensors["vectors"], tensors["counts"].tolist()))
        for row, key in enumerate(_unpacked(tensors["keys"])):
            self._places[key] = (number, row)


class Store:
    """What the last `rayfuse data embed` into a folder serves.

    Attributes:
        folder: The store.
        served: Whose vectors.
        extractor: What the first extractor's depend on.
        width: D.
    """

    def __init__(self, folder: Path) -> None:
        """Open a store.

        Raises:
            InputError: There is none, or a file of it is damaged.
        """
        self.folder = folder
        self.served = _read(folder / SERVED, Served, "`rayfuse data embed RUN --out` fills one")
        self.extractor = self._extractors()[0]
        self._shelves = [Shelf(folder / key) for key in self.served.extractors]
        for shelf in self._shelves:
            for path, fault in shelf.damaged.items():
                raise InputError(
                    f"{path}: damaged ({fault}); `{self.served.command}` computes it again"
                )
        widths = [shelf.width for shelf in self._shelves if shelf.width is not None]
        if not widths:
            raise InputError(f"{folder}: no text is in it yet; run `{self.served.command}`")
        self.width: int = widths[0]
        self._of_rows = self._table()

    def find(self, row: int, key: bytes) -> Kept | None:
        """The vector of a row's text by the extractor that serves the row; None if not here.

        Args:
            row: Of the shards. It is told apart only where rows have extractors of their own.
            key: Of its text.
        """
        extractor = self._of_rows.get((row, key)) if self.served.rows else 0
        if extractor is None or key not in self._shelves[extractor]:
            return None
        return self._shelves[extractor][key]

    def _extractors(self) -> list[Extractor]:
        hint = f"run `{self.served.command}`"
        return [
            _read(self.folder / key / EXTRACTOR, Extractor, hint) for key in self.served.extractors
        ]

    def _table(self) -> dict[tuple[int, bytes], int]:
        if self.served.rows is None:
            return {}
        path = _table_path(self.folder, self.served.rows)
        try:
            table = read_hashed(path)
        except DamagedError as fault:
            raise InputError(f"{path}: damaged ({fault}); run `{self.served.command}`") from None
        rows = zip(table["rows"].tolist(), _unpacked(table["keys"]), strict=True)
        return dict(zip(rows, table["extractors"].tolist(), strict=True))


def declare(folder: Path, extractor: Extractor) -> Path:
    """Make the folder of an extractor in a store; its path."""
    place = folder / extractor.key
    for made in (folder, place):
        made.mkdir(parents=True, exist_ok=True, mode=_PRIVATE_FOLDER)
    write_json(place / EXTRACTOR, extractor.model_dump(mode="json"), mode=PRIVATE)
    return place


def serve(
    folder: Path,
    extractors: Sequence[Extractor],
    command: str,
    rows: Sequence[tuple[int, bytes, int]] | None = None,
) -> None:
    """Say whose vectors runs of this store read.

    Args:
        folder: The store.
        extractors: Declared; the first one serves all rows, unless `rows` are given.
        command: That computes what is missing.
        rows: Of every row of the shards that has a text: its number, its text's key, and the place
            of its extractor.
    """
    named = None
    if rows is not None:
        joined = b"".join(key for _, key, _ in rows)
        table = {
            "rows": torch.tensor([row for row, _, _ in rows], dtype=torch.int64),
            "keys": torch.frombuffer(bytearray(joined), dtype=torch.uint8).view(-1, _KEY_BYTES),
            "extractors": torch.tensor([place for *_, place in rows], dtype=torch.int32),
        }
        named = digest(table)
        write_hashed(_table_path(folder, named), table)
    served = Served(extractors=tuple(each.key for each in extractors), rows=named, command=command)
    write_json(folder / SERVED, served.model_dump(mode="json"), mode=PRIVATE)
    for path in folder.glob("rows-*.safetensors"):
        if named is None or path != _table_path(folder, named):
            path.unlink()


def _table_path(folder: Path, named: str) -> Path:
    return folder / f"rows-{named[:32]}.safetensors"


def _unpacked(keys: Tensor) -> list[bytes]:
    raw = keys.contiguous().numpy().tobytes()
    return [raw[first : first + _KEY_BYTES] for first in range(0, len(raw), _KEY_BYTES)]


def _read(path: Path, kind: type[RecordT], hint: str) -> RecordT:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version = document.get("format") if isinstance(document, dict) else None
        if version == FORMAT:
            return kind.model_validate(document)
    except FileNotFoundError:
        raise InputError(
            f"{path}: missing, so {path.parent} holds no kept embeddings; {hint}"
        ) from None
    except (ValueError, ValidationError) as error:
        raise InputError(f"{path}: not what was written ({type(error).__name__}); {hint}") from None
    raise InputError(f"{path}: format {version!r}, but this version reads {FORMAT}; {hint}")
