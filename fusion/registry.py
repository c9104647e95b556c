"""Models by name: fusion/models/<name>.py holds the class registered as <name>."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import TYPE_CHECKING

from data.errors import InputError

if TYPE_CHECKING:
    from fusion.model import FusionModel

_MODELS: dict[str, type[FusionModel]] = {}


def register(name: str, model: type[FusionModel]) -> None:
    """Record a model class; called by FusionModel.__init_subclass__."""
    _MODELS[name] = model


def names() -> tuple[str, ...]:
    """The names of all models, from the files of fusion/models."""
    package = importlib.import_module("fusion.models")
    return tuple(sorted(module.name for module in pkgutil.iter_modules(package.__path__)))


def get(name: str) -> type[FusionModel]:
    """The model class of that name, imported on first use.

    Raises:
        InputError: No file of fusion/models has that name.
    """
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(names())}"
        raise InputError(f"unknown model {name!r}; {hint}")
    importlib.import_module(f"fusion.models.{name}")
    return _MODELS[name]
