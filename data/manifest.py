"""The manifest beside the shards: what they are, where they come from, what was left out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from data.config import Config
from data.errors import InputError
from data.files import sha256_json, write_json
from data.flow import FlowStep, Quarantined
from data.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME = "manifest.json"


class ShardFile(Config):
    """One Parquet shard; its rows' indices follow those of the shards before it."""

    name: str
    """Relative to the manifest's folder, e.g. shards/part-00003.parquet."""
    rows: int
    sha256: str


class Manifest(Config):
    """Written last, by rename: a folder without it holds no cohort."""

    schema_version: int = SCHEMA_VERSION
    task: str
    labels: tuple[str, ...]
    preset: str
    """corrected, code, paper, or custom where a data switch differs from all three."""
    release: str
    """Detected, e.g. mimic-iv-2.2."""
    sources: dict[str, str]
    """Name of each source -> hash of its table names, sizes and headers; no paths."""
    config: dict[str, Any]
    """The ExtractConfig as dumped."""
    config_hash: str
    code_version: str
    files: tuple[ShardFile, ...]
    splits: dict[str, int]
    """Rows per split."""
    prevalence: dict[str, tuple[float, ...]]
    """Positive share of each label, per split."""
    overlap: dict[str, dict[str, int]]
    """Per split: rows with each modality and with both, e.g. {ehr: 10, cxr: 3, ehr+cxr: 3}."""
    flow: tuple[FlowStep, ...]
    excluded_sha256: str = ""
    """Of excluded.parquet, which says what rule removed each stay; empty if none was removed."""
    quarantine: tuple[Quarantined, ...] = ()
    counters: dict[str, int] = {}  # noqa: RUF012
    """Counted repairs that removed nothing (units converted, values clipped, ...)."""

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(file.rows for file in self.files)

    @property
    def digest(self) -> str:
        """The hash that names everything derived from these shards."""
        return sha256_json(self.model_dump(mode="json"))

    def write(self, folder: Path) -> None:
        """Write it into `folder`, whole or not at all."""
        write_json(folder / FILE_NAME, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of a shard folder.

        Raises:
            InputError: The folder holds none, or one of another schema version.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            raise InputError(
                f"{folder}: no {FILE_NAME}, so no finished extraction; "
                "run `rayfuse data extract` with --out of this folder"
            )
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: not valid JSON ({error}); extract again") from None
        found = value.get("schema_version") if isinstance(value, dict) else None
        if found != SCHEMA_VERSION:
            older = f"of schema version {found}, " if isinstance(found, int) else ""
            raise InputError(
                f"{path}: {older}not a manifest of schema version {SCHEMA_VERSION}; extract again"
            )
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise InputError(f"{path}: {place}: {first['msg']}; extract again") from None
