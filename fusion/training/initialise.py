"""Start parts of a model from a trained run or a weights file (`init_from`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.errors import InputError
from fusion.training.checkpoint import read_weights
from fusion.training.optim import matches
from fusion.weights import read_state

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch import Tensor


def initial_weights(
    shapes: Mapping[str, torch.Size], sources: Mapping[str, Path]
) -> dict[str, Tensor]:
    """Every parameter and buffer below each prefix from its source, under the same name.

    Args:
        shapes: Of the model's parameters and buffers.
        sources: Prefix ("" is the whole model) -> run folder (its best/), or weights file.

    Raises:
        InputError: A source cannot be read, or lacks a name, or has it in another shape.
    """
    weights: dict[str, Tensor] = {}
    for prefix, source in sources.items():
        wanted = [name for name in shapes if matches(name, prefix)]
        if not wanted:
            tops = dict.fromkeys(name.split(".")[0] for name in shapes)
            raise InputError(
                f"init_from.{prefix}: the model has no such submodule; it has {', '.join(tops)}"
            )
        found = _read(source)
        for name in wanted:
            weights[name] = _matching(found, name, shapes[name], f"init_from.{prefix}: {source}")
    return weights


def _read(source: Path) -> dict[str, Tensor]:
    if source.is_dir():
        return read_weights(source / "best" if (source / "best").is_dir() else source)[0]
    if not source.is_file():
        raise InputError(f"init_from: {source} does not exist; give a run folder or weights file")
    return read_state(source)


def _matching(found: Mapping[str, Tensor], name: str, shape: torch.Size, where: str) -> Tensor:
    if name not in found:
        tops = ", ".join(dict.fromkeys(other.split(".")[0] for other in found))
        raise InputError(f"{where} has no {name!r}; it holds {tops}")
    if found[name].shape != shape:
        raise InputError(
            f"{where}: {name} has shape {tuple(found[name].shape)}, but the model's has "
            f"{tuple(shape)}; use the same sizes in both runs"
        )
    return found[name]
