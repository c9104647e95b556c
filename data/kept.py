"""What is fitted on the train split: computed once and kept beside the shards, with its hash."""

from __future__ import annotations

import errno
import json
import logging
from typing import TYPE_CHECKING, Any, TypeVar

from data.errors import InputError
from data.files import sha256_json, write_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

T = TypeVar("T")


def kept(
    path: Path, what: str, fit: Callable[[], dict[str, Any]], build: Callable[[dict[str, Any]], T]
) -> T:
    """What a kept file holds, fitted and written where it is not there yet.

    Args:
        path: Its name has everything it depends on.
        what: Its name in errors and the log, "normaliser".
        fit: Gives the body, for JSON.
        build: From the body to what it holds.

    Raises:
        InputError: The file was altered or is no such file.
    """
    if path.is_file():
        return read(path, what, build)
    body = fit()
    try:
        write_json(path, {**body, "sha256": sha256_json(body)})
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS):
            raise
        logger.warning("%s is read-only: the %s is fitted in each run", path.parent, what)
    return build(body)


def read(path: Path, what: str, build: Callable[[dict[str, Any]], T]) -> T:
    """What a kept file holds.

    Raises:
        InputError: The file was altered or is no such file.
    """
    try:
        body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if body.pop("sha256") != sha256_json(body):
            raise ValueError("its hash does not hold")
        return build(body)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: no valid {what} ({error}); delete it") from None
