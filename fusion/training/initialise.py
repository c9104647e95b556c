"""Start parts of a model from a trained run or a weights file (`init_from`).

What stays frozen as it came is not written into checkpoints: they name its source and hash.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data.errors import InputError
from fusion import adapters
from fusion.encoders.text_adapters import is_adapter, lora_config
from fusion.hashed import digest
from fusion.training.checkpoint import Base, read_weights
from fusion.training.optim import matches
from fusion.training.references import refuse_other_base, stored_references
from fusion.weights import read_state

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor

    from fusion.encoders.text import TextEncoder


def initial_weights(
    shapes: Mapping[str, torch.Size],
    sources: Mapping[str, Path],
    referenced: Mapping[str, Base] | None = None,
    reader: tuple[TextEncoder, Sequence[str]] | None = None,
) -> dict[str, Tensor]:
    """Every parameter and buffer below each prefix from its source, under the same name.

    Args:
        shapes: Of the model's parameters and buffers.
        sources: Prefix ("" is the whole model) -> run folder (its best/), folder of an adapter, or
            weights file.
        referenced: What the model's constructor has read, by prefix.
        reader: The model's text encoder, if it has one, and the task's labels: an adapter is for
            one base and, with its head, for one set of labels.

    Raises:
        InputError: A source cannot be read, or lacks a name, or has it in another shape, or was
            trained on another base, or its adapters are of another form or scale.
    """
    weights: dict[str, Tensor] = {}
    for prefix, source in sources.items():
        wanted = [name for name in shapes if matches(name, prefix)]
        if not wanted:
            tops = dict.fromkeys(name.split(".")[0] for name in shapes)
            raise InputError(
                f"init_from.{prefix}: the model has no such submodule; it has {', '.join(tops)}"
            )
        if adapters.is_written(source):
            found = _read_adapter(source, wanted, referenced or {}, reader)
        else:
            found, meta = _read(source, referenced or {})
            if reader is not None and any(is_adapter(name) for name in wanted):
                _refuse_other_form(source, meta, reader[0])
        for name in wanted:
            weights[name] = _matching(found, name, shapes[name], f"init_from.{prefix}: {source}")
    return weights


def _read_adapter(
    folder: Path,
    wanted: Collection[str],
    referenced: Mapping[str, Base],
    reader: tuple[TextEncoder, Sequence[str]] | None,
) -> dict[str, Tensor]:
    if reader is None:
        raise InputError(f"init_from: {folder} is an adapter, but the model reads no text")
    text, labels = reader
    headed = any(name.startswith("head.") for name in wanted)
    base = referenced.get("text")
    base_sha256 = base.sha256 if base else None
    return adapters.fitting_weights(folder, text, labels if headed else None, base_sha256)


def _refuse_other_form(run: Path, meta: Mapping[str, Any], text: TextEncoder) -> None:
    held = meta.get("config", {}).get("model", {})
    if "adapter" in held:
        form = lora_config(
            held["adapter"],
            rank=held["rank"],
            alpha=held["alpha"],
            dropout=held["adapter_dropout"],
            target_modules=held["target_modules"],
        )
        adapters.refuse_other_form(run, vars(form), text)


def frozen_base(
    weights: Mapping[str, Tensor], sources: Mapping[str, Path], frozen: Collection[str]
) -> dict[str, Base]:
    """The frozen parameters among `weights`, by the prefix whose source gave them.

    Args:
        weights: As `initial_weights` or `read_base` read them from the sources.
        sources: As there.
        frozen: Names of parameters that are not trained.
    """
    bases = {}
    for prefix, source in sources.items():
        others = list(sources)[list(sources).index(prefix) + 1 :]
        names = [
            name
            for name in sorted(weights.keys() & set(frozen))
            # Where two prefixes match, the later source was written over the earlier one.
            if matches(name, prefix) and not any(matches(name, other) for other in others)
        ]
        if names:
            kept = {name: weights[name] for name in names}
            bases[prefix] = Base(source=str(source), sha256=digest(kept), names=tuple(names))
    return bases


def read_base(bases: Mapping[str, Base], sources: Mapping[str, Path]) -> dict[str, Tensor]:
    """What a checkpoint left to its sources, read from them again.

    Args:
        bases: By prefix, from the checkpoint.
        sources: As in `initial_weights`, of this start.

    Raises:
        InputError: A source is missing, or holds other weights than those that were frozen.
    """
    weights: dict[str, Tensor] = {}
    for prefix, base in bases.items():
        if prefix not in sources:
            raise InputError(
                f"init_from.{prefix}: not set, but the checkpoint leaves {len(base.names)} frozen "
                f"parameters to it; set it to {base.source}"
            )
        where = f"init_from.{prefix}: {sources[prefix]}"
        found, _ = _read(sources[prefix])
        if missing := [name for name in base.names if name not in found]:
            raise InputError(f"{where} has no {missing[0]!r}, which the checkpoint leaves to it")
        kept = {name: found[name] for name in base.names}
        if (now := digest(kept)) != base.sha256:
            raise InputError(
                f"{where} holds other weights than this run began with: sha256 {now}, but the "
                f"checkpoint names {base.sha256} (then at {base.source}); put those back"
            )
        weights |= kept
    return weights


def _read(
    source: Path, referenced: Mapping[str, Base] | None = None
) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Weights, and the meta.json of a run's."""
    if adapters.is_written(source):
        return adapters.stored_weights(source), {}
    if source.is_dir():
        best = source / "best" if (source / "best").is_dir() else source
        weights, meta = read_weights(best)
        for prefix, stored in stored_references(meta).items():
            if referenced is not None:
                here = referenced.get(prefix)
                refuse_other_base(prefix, stored, here.sha256 if here else None)
        return weights, meta
    if not source.is_file():
        raise InputError(f"init_from: {source} does not exist; give a run folder or weights file")
    return read_state(source), {}


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
