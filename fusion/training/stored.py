"""Tensors by name in safetensors files, read one at a time: no worker holds a whole checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path


class Stored(Mapping[str, Tensor]):
    """The tensors of several safetensors files, each read when it is asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._at: dict[str, Any] = {}
        for path in files:
            handle: Any = safe_open(path, "pt")
            self._at.update(dict.fromkeys(handle.keys(), handle))

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._at[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that need not be read."""
        return tuple(self._at[name].get_slice(name).get_shape())


class Joined(Mapping[str, Tensor]):
    """What a checkpoint stores and the base that it leaves out, as one mapping."""

    def __init__(self, stored: Stored, base: Mapping[str, Tensor]) -> None:
        self._stored, self._base = stored, base

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name] if name in self._stored else self._base[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**dict.fromkeys(self._stored), **dict.fromkeys(self._base)})

    def __len__(self) -> int:
        return len(set(self._stored) | set(self._base))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that need not be read."""
        return self._stored.shape(name) if name in self._stored else tuple(self._base[name].shape)
