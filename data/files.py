"""The one seam through which results reach a disk: whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PRIVATE = 0o600


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `target`, renamed onto it if the block succeeds.

    A file is fsynced before the rename; on an exception (a full disk, Ctrl-C) whatever was written
    under the temporary name is removed and `target` is left as it was. The block may make either a
    file or a folder at the path it is given; a folder replaces only an absent target.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield temporary
        if temporary.is_file():
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str, *, mode: int = 0o644) -> None:
    """Write UTF-8 text whole or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(mode)


def write_json(target: Path, value: Any, *, mode: int = 0o644) -> None:
    """Write JSON (sorted keys, two-space indent) whole or not at all."""
    write_text(target, json.dumps(value, indent=2, sort_keys=True, default=str) + "\n", mode=mode)


def sha256_file(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """The hexadecimal SHA-256 of a value's canonical JSON."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()
