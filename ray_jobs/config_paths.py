"""A run's config with other values at some dotted paths."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from data.config import Config
from data.errors import InputError
from ray_jobs.config import RunConfig, checked

if TYPE_CHECKING:
    from collections.abc import Mapping


def replaced(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The config with these values, dotted path -> value, validated as a whole.

    Raises:
        InputError: A path does not exist, or a value is refused; one line each.
    """
    document = config.model_dump()
    for path, value in values.items():
        *parents, leaf = keys(config, path)
        block = document
        for parent in parents:
            block = block[parent]
        block[leaf] = value
    return checked(RunConfig, document, place=", ".join(f"{k}={v!r}" for k, v in values.items()))


def keys(config: Config, path: str) -> list[str]:
    """A dotted path as keys of the nested config; below a mapping, the rest is one key.

    Raises:
        InputError: The config has no such path.
    """
    found: list[str] = []
    block: Any = config
    parts = path.split(".")
    while parts:
        if isinstance(block, dict):
            return [*found, ".".join(parts)]
        here = ".".join(found) or "a run"
        if not isinstance(block, Config):
            raise InputError(f"{path}: {here} is a single value, so there is no {parts[0]!r} in it")
        name = parts.pop(0)
        known = list(type(block).model_fields)
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}"
            raise InputError(f"{path}: {here} has no {name!r}; {hint}")
        found.append(name)
        block = getattr(block, name)
    if isinstance(block, Config):
        raise InputError(
            f"{path}: it is a block; name one of its values, e.g. {path}.{_any(block)}"
        )
    return found


def _any(block: Config) -> str:
    return next(iter(type(block).model_fields), "")
