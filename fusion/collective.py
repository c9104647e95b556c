"""Reductions over the workers inside a model's forward pass.

A pass is collective when every worker runs it and takes part in each of its reductions: the passes
of training are, evaluation is not.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import distributed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_COLLECTIVE = False


@contextmanager
def collective_statistics() -> Iterator[None]:
    """A training forward pass, in which every worker takes part in every reduction."""
    global _COLLECTIVE
    previous, _COLLECTIVE = _COLLECTIVE, torch.is_grad_enabled()
    try:
        yield
    finally:
        _COLLECTIVE = previous


def is_collective() -> bool:
    """Whether such a pass runs."""
    return _COLLECTIVE


@torch.no_grad()
def sum_over_workers(tensor: Tensor) -> Tensor:
    """The sum over all workers in a collective pass, the tensor's own values outside of any."""
    total = tensor.detach().clone()
    if _COLLECTIVE and distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
    return total
