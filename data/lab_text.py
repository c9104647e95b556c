"""Abnormal results as the sentence that the text model reads, and back."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

OPENING: Final = "These are abnormal results recorded:"
_ENTRY: Final = re.compile(r"ITEMID ([^:;]+): ([^ ;]+)(?: ([^;]*))?;")
_RESERVED: Final = str.maketrans({":": ",", ";": ",", "\n": " ", "\r": " ", "\t": " ", "\0": ""})


class Result(NamedTuple):
    """One abnormal result: the test's name, its value as recorded, its unit or an empty text."""

    name: str
    value: str
    unit: str


def write_lab_text(results: Sequence[Result]) -> str:
    """The template of Phan et al.: `... ITEMID <name>: <value> <unit>; ITEMID ...;`.

    Colons and semicolons inside a name, a value or a unit become commas, and blanks inside a value
    are left out, so that the sentence can be read back.
    """
    entries = []
    for name, value, unit in results:
        number = "".join(value.translate(_RESERVED).split())
        shown = " ".join(name.translate(_RESERVED).split())
        end = " ".join(unit.translate(_RESERVED).split())
        entries.append(f"ITEMID {shown}: {number}{' ' + end if end else ''};")
    return " ".join([OPENING, *entries])


def read_lab_text(text: str) -> list[Result]:
    """The results of a sentence that `write_lab_text` wrote."""
    return [Result(name, value, unit or "") for name, value, unit in _ENTRY.findall(text)]
