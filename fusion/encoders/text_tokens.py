"""From a note and its abnormal results to tokens: one rule of truncation, and what it cut."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from data.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from data.schema import Batch
    from fusion.encoders.text_base import Base

TextSource = Literal["notes_and_labs", "notes", "labs"]

LONGEST: Final = 200_000
"""Characters of a note or a sentence beyond which nothing is looked at (an extraction's limit)."""
REMEMBERED: Final = 4096
"""Texts whose tokens are kept, the latest ones."""


def as_read(note: str | None, labs: str | None, source: TextSource) -> tuple[str, str]:
    """What is read of a row's note and sentence of results; "" for what is not."""
    return ("" if source == "labs" else note or "", "" if source == "notes" else labs or "")


def pairs_of(batch: Batch, source: TextSource) -> list[tuple[str, str]]:
    """[B] what is read of each row."""
    notes: list[str | None] = [None] * len(batch)
    for row, note in zip(batch.notes_index.tolist(), batch.notes, strict=True):
        notes[row] = note
    labs = batch.lab_texts or [None] * len(batch)
    return [as_read(*pair, source) for pair in zip(notes, labs, strict=True)]


class Read(Protocol):
    """A text that was read: how long it is, and what was cut."""

    @property
    def length(self) -> int:
        """Tokens."""
        ...

    @property
    def note_cut(self) -> int:
        """Tokens of the note that were left out."""
        ...

    @property
    def labs_cut(self) -> int:
        """Tokens of the sentence of results that were left out."""
        ...


@dataclass(frozen=True)
class Tokens:
    """One text as the model reads it.

    Attributes:
        ids: Token ids, special ones included; at least one.
        note_cut: Tokens of the note that were left out.
        labs_cut: Tokens of the sentence of results that were left out.
        empty: It has neither a note nor results.
    """

    ids: tuple[int, ...]
    note_cut: int = 0
    labs_cut: int = 0
    empty: bool = False

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.ids)


@dataclass
class Tally:
    """What was read since it was last asked for.

    Attributes:
        texts: Texts read.
        tokens: Their tokens.
        notes_cut, labs_cut: Texts of which a part of the note, of the results, was left out.
        tokens_cut: Tokens left out in all.
        empty: Rows without any text.
    """

    texts: int = 0
    tokens: int = 0
    notes_cut: int = 0
    labs_cut: int = 0
    tokens_cut: int = 0
    empty: int = 0

    def add(self, texts: Sequence[Read | None]) -> None:
        """Count rows' texts; None where a row has none."""
        for text in texts:
            if text is None:
                self.empty += 1
                continue
            self.texts += 1
            self.tokens += text.length
            self.notes_cut += text.note_cut > 0
            self.labs_cut += text.labs_cut > 0
            self.tokens_cut += text.note_cut + text.labs_cut

    def take(self) -> dict[str, float]:
        """The counts, named for the log; they begin again at 0."""
        counts = {f"text_{each.name}": float(getattr(self, each.name)) for each in fields(self)}
        for each in fields(self):
            setattr(self, each.name, 0)
        return counts


class Tokenizer:
    """A base's tokenizer, and the layout: BOS, note, line break, results, SEP.

    Truncation: the note is cut first and keeps its head. Results that take more than half of the
    length beside a note lose their last entries, down to one; an entry is kept whole or not at all.
    A word that looks like one of the model's special tokens is text.

    Attributes:
        pad_id: Fills rows up to the longest. It is masked and texts are pooled by their length, so
            an end-of-text token may serve; it is the tokenizer's own where it has one.
    """

    def __init__(self, base: Base, max_length: int, pad_token: str | None = None) -> None:
        """Read the tokenizer of a base.

        Args:
            base: Holds its files.
            max_length: Most tokens of a text, special ones included.
            pad_token: A token of the vocabulary to pad with; None takes the tokenizer's own, or
                else its end-of-text token.

        Raises:
            InputError: There is no tokenizer, or no token to pad with.
        """
        self._tokenizer = _read(base)
        self._max_length = max_length
        self.pad_id = _pad_id(self._tokenizer, pad_token, base)
        largest, known = max(self._tokenizer.get_vocab().values()), base.config.vocab_size
        if largest >= known:
            raise InputError(
                f"model.backbone: {base.folder}: the tokenizer has token {largest}, but the model "
                f"knows {known}; give the model its own tokenizer"
            )
        self._first, self._last = _around(self._tokenizer)
        self._newline = self._encode("\n")[0]
        self._known: OrderedDict[tuple[str, str], Tokens] = OrderedDict()

    @property
    def pad_token(self) -> str:
        """The token of `pad_id`."""
        token: str = self._tokenizer.convert_ids_to_tokens(self.pad_id)
        return token

    def encode(self, note: str, labs: str) -> Tokens:
        """The tokens of a note and a sentence of results, either of which may be empty."""
        key = (note, labs)
        if key not in self._known:
            self._known[key] = self._encoded(_plain(note), _plain(labs))
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def save(self, folder: str) -> None:
        """Write the tokenizer, its padding token set."""
        self._tokenizer.pad_token = self.pad_token
        self._tokenizer.save_pretrained(folder)

    def _encoded(self, note: str, labs: str) -> Tokens:
        room = self._max_length - len(self._first) - len(self._last)
        note_ids, _ = self._encode(note)
        lab_ids, ends = self._encode(labs)
        between = self._newline if note_ids and lab_ids else []
        kept_labs = lab_ids
        if len(note_ids) + len(between) + len(lab_ids) > room:
            most = max(room // 2, room - len(note_ids) - len(between)) if note_ids else room
            kept_labs = lab_ids[: _whole_entries(labs, ends, most, room)]
        kept_note = note_ids[: max(room - len(kept_labs) - len(between), 0)]
        if not kept_note or not kept_labs:
            between = []
        return Tokens(
            (*self._first, *kept_note, *between, *kept_labs, *self._last) or (self.pad_id,),
            note_cut=len(note_ids) - len(kept_note),
            labs_cut=len(lab_ids) - len(kept_labs),
            empty=not note_ids and not lab_ids,
        )

    def _encode(self, text: str) -> tuple[list[int], list[int]]:
        """Ids, and the character after each one."""
        if not text:
            return [], []
        encoded = self._tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        return encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]


def _whole_entries(text: str, ends: list[int], most: int, room: int) -> int:
    """How many tokens make up the whole entries among the first `most`, or the first in `room`.

    An entry ends with a semicolon.
    """
    borders = [place for place, end in enumerate(ends, 1) if text[end - 1] == ";"]
    kept = [border for border in borders if border <= most]
    first = [border for border in borders[:1] if border <= room]
    return (kept or first or [0])[-1]


def _plain(text: str) -> str:
    return text[:LONGEST].replace("\0", " ").strip()


def _read(base: Base) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base.folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"model.backbone: {base.folder}: its tokenizer cannot be read "
            f"({type(error).__name__}); it needs tokenizer.json and tokenizer_config.json"
        ) from None
    if not tokenizer.is_fast:
        raise InputError(
            f"model.backbone: {base.folder}: no tokenizer.json; convert the tokenizer to one"
        )
    return tokenizer


def _pad_id(tokenizer: Any, chosen: str | None, base: Base) -> int:
    if chosen is not None:
        number = tokenizer.get_vocab().get(chosen)
        if number is None:
            raise InputError(
                f"model.pad_token: {chosen!r} is not in the vocabulary of {base.name}; choose a "
                "token that is, or leave it null"
            )
        return int(number)
    for number in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id):
        if number is not None:
            return int(number)
    raise InputError(
        f"model.pad_token: the tokenizer of {base.name} has neither a padding nor an end-of-text "
        "token; name a token of its vocabulary"
    )


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens before and after a text: BOS, or CLS and SEP."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(
        place
        for place in range(len(whole) - len(inner) + 1)
        if whole[place : place + len(inner)] == inner
    )
    return whole[:start], whole[start + len(inner) :]
