"""How one raw table of a release becomes a canonical one."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """One raw table.

    Attributes:
        table: Its file's stem, lower case.
        into: The canonical table (data.sources.canonical).
        columns: Canonical column -> names it has in releases, lower case, the newest first.
        constants: Canonical columns that the table does not hold and that are the same in all rows.
        source: chart, lab or output, for a table of events.
        key: A column that must be unique.
    """

    table: str
    into: str
    columns: Mapping[str, tuple[str, ...]]
    constants: Mapping[str, str | int] = field(default_factory=lambda: MappingProxyType({}))
    source: str | None = None
    key: str | None = None


def same(names: str, **renamed: str) -> dict[str, tuple[str, ...]]:
    """Canonical -> raw names: `names` keep theirs; `renamed` gives raw names, blank separated."""
    columns = {name: (name,) for name in names.split()}
    return columns | {canonical: tuple(raw.split()) for canonical, raw in renamed.items()}
