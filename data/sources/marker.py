"""A folder of invented patients says so, and every release read from it is named accordingly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from data.files import write_text

if TYPE_CHECKING:
    from pathlib import Path

MARKER: Final = "SYNTHETIC"
SUFFIX: Final = "-synthetic"
_SENTENCE: Final = (
    "Invented by `rayfuse data synth`: no row, image or note here is of a real patient.\n"
)


def mark(folder: Path) -> None:
    """Write the marker into a raw folder."""
    write_text(folder / MARKER, _SENTENCE)


def named(release: str, folder: Path) -> str:
    """The release's name, with `-synthetic` where the folder is marked."""
    return release + SUFFIX if (folder / MARKER).is_file() else release
