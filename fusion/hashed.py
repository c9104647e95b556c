"""Tensors in files that carry the hash of what they hold: whole, or not taken."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from data.files import PRIVATE, atomic_path

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


class DamagedError(Exception):
    """What is wrong with a file."""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of tensors' names, types, shapes and values, in whatever files they lie."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def write_hashed(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors and their hash, for this user alone, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.touch(mode=PRIVATE)
        temporary.write_bytes(save(tensors, {"sha256": digest(tensors)}))
        temporary.chmod(PRIVATE)


def read_hashed(path: Path) -> dict[str, Tensor]:
    """The tensors of `write_hashed`; their values stay in the file until they are copied.

    Raises:
        DamagedError: It cannot be read, or does not hold what was written.
    """
    try:
        with safe_open(path, "pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            kept = (handle.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        raise DamagedError(str(error)) from None
    if kept != digest(tensors):
        raise DamagedError("its hash does not fit")
    return tensors
