"""The sections of a discharge summary, and the four that tell what was known at admission."""

from __future__ import annotations

import re
from typing import Final, Literal

Headers = Literal["paper", "wide"]
Section = Literal["complaint", "present", "past", "medications"]

SECTIONS: Final[tuple[Section, ...]] = ("complaint", "present", "past", "medications")
_NAMES: Final[dict[Section, tuple[str, str]]] = {
    # The paper's four with the variants its brackets name, and what `wide` knows beside them.
    "complaint": (r"chief complaints?", r"cc|reason for (?:visit|admission)|presenting complaint"),
    "present": (
        r"(?:history of )?(?:the )?present(?:ing)? illness",
        r"hpi|history of presenting? .*",
    ),
    "past": (r"(?:past )?medical history", r"pmhx?|past history|past medical/surgical history"),
    "medications": (
        r"(?:medications?|meds) (?:on|upon|at|prior to) admission|admission medications?",
        r"(?:current |home |outpatient )?(?:medications?|meds)(?: at home)?",
    ),
}
_WANTED: Final[dict[Headers, dict[Section, re.Pattern[str]]]] = {
    "paper": {name: re.compile(paper) for name, (paper, _) in _NAMES.items()},
    "wide": {name: re.compile(f"{paper}|{wide}") for name, (paper, wide) in _NAMES.items()},
}
_LONGEST: Final = 60
_WORDS: Final = 7
_SMALL: Final = frozenset(
    (
        "a",
        "and",
        "at",
        "by",
        "for",
        "from",
        "in",
        "of",
        "on",
        "or",
        "per",
        "prior",
        "the",
        "to",
        "with",
    )
)
_SHORT_FORM: Final = re.compile(r" ?\([a-z]{1,10}\)$")
_COURSE: Final = r"(?:(?:brief|concise|summary|of|the) )*(?:hospital|icu|clinical) course"
_WHOSE: Final = r"(?:admission|admitting|discharge|final|principal|primary|secondary|other)"
_ENDS: Final = re.compile(
    # What names the labels ends a section, however it is written: numbered, starred, in any case.
    rf"[\W\d_]*({_COURSE}(?: (?:by|in|with|and)\b[^:]*)?|(?:{_WHOSE}\W+(?:and )?)+diagnos[ei]s"
    # Alone they are also words inside a section (`Diagnosis: AML`), unless in capitals.
    r"|(?-i:COURSE|DIAGNOS[EI]S|IMPRESSION|ASSESSMENT|DISPOSITION|PLAN))\W*(:|$)",
    re.IGNORECASE,
)
_MAY_END: Final = re.compile(r"course|diagnos|impr|assess|dispo|plan", re.IGNORECASE)
_BRACKETS: Final = re.compile(r"\[\*\*[^\[\]]{0,200}?\*\*\]")
_BLANKS: Final = re.compile(r"[ \t]+")
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def clean_text(text: str) -> str:
    """Without null bytes and other control characters; every line end is one line feed."""
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def without_brackets(text: str) -> str:
    """Without MIMIC-III's de-identification brackets; blanks in a row become one."""
    return _BLANKS.sub(" ", _BRACKETS.sub("", text))


def header_of(line: str) -> tuple[str, str] | None:
    """The header that a line begins with, lower case, and the text after it; None for prose.

    A header stands at the start of its line and begins with a capital. Before a colon it is a few
    words; with text after the colon, each of them but small ones begins with a capital too, so that
    `Of note: ...` and `Temperature: 98` inside a section differ from `Brief Hospital Course: ...`.
    Without a colon it is a line of capitals. A hospital course and diagnoses begin in any writing.
    One line costs time in its length at most.
    """
    stripped = line.strip()
    start = stripped[: 2 * _LONGEST]
    if _MAY_END.search(start) and (ends := _ENDS.match(without_brackets(start))):
        return ends[1].lower(), stripped.partition(":")[2].strip()
    name, colon, rest = stripped[: _LONGEST + 1].partition(":")
    rest = stripped[len(name) + 1 :].strip() if colon else ""
    words = name.split()
    if not words or len(words) > _WORDS or not name[0].isupper():
        return None
    if not all(letter.isalpha() or letter in " /&()'-" for letter in name):
        return None
    if not colon:
        shouted = name.isupper() and len(stripped) <= _LONGEST and len(name) > 1
        return (name.lower(), "") if shouted else None
    titled = all(word[0].isupper() or word in _SMALL for word in words if word[0].isalpha())
    name = _SHORT_FORM.sub("", name.strip().lower())
    known = any(want.fullmatch(name) for want in _WANTED["wide"].values())
    if rest and not known and not (titled and len(words) > 1):
        return None
    return name, rest


def admission_sections(text: str, headers: Headers = "paper") -> dict[Section, str]:
    """The four sections of a note, each with its header line, in the note's order.

    A section ends at the next line that looks like a header. Of two sections of one kind, both are
    kept, one after the other. A note without any gives an empty dict.

    Args:
        text: A whole note.
        headers: Which header lines count.
    """
    found: dict[Section, list[str]] = {}
    current: list[str] | None = None
    for line in clean_text(text).split("\n"):
        header = header_of(line)
        if header is not None:
            kind = next(
                (name for name, want in _WANTED[headers].items() if want.fullmatch(header[0])), None
            )
            current = None if kind is None else found.setdefault(kind, [])
        if current is not None:
            current.append(without_brackets(line).rstrip())
    joined = {kind: "\n".join(_squeezed(lines)) for kind, lines in found.items()}
    return {kind: section for kind, section in joined.items() if _says_something(section)}


def _squeezed(lines: list[str]) -> list[str]:
    """Without empty lines at the end and without two empty lines in a row."""
    kept = [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]
    while kept and not kept[-1]:
        kept.pop()
    return kept


def _says_something(section: str) -> bool:
    """Whether anything follows the header."""
    first, _, rest = section.partition("\n")
    header = header_of(first)
    return bool(rest.strip()) or bool(header and header[1])


def kept_text(
    text: str, *, headers: Headers = "paper", sections: Literal["admission", "all"] = "admission"
) -> str:
    """What of a note is used: the four sections joined by line ends, or all of it; may be empty."""
    if sections == "all":
        return "\n".join(
            _squeezed([without_brackets(x).rstrip() for x in clean_text(text).split("\n")])
        )
    return "\n".join(admission_sections(text, headers).values())
