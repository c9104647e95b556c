"""Where weights that a model reads from files go while it is built.

A constructor knows no workers. A strategy says here, for the time of the construction, on which
device parameters belong, whether this worker reads their values, and what becomes of each.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Placement(Protocol):
    """What a strategy does with parameters that are read one by one."""

    device: torch.device
    reads: bool
    """Whether this worker must give the values; if not, any values of the shape will do."""
    shards: bool
    """Whether a worker keeps a part of each parameter only."""

    def keep(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take parameters that hold their values; a shard of each may be all that is left.

        Every worker calls it for the same parameters in the same order.
        """
        ...


class Whole:
    """Every worker reads everything and keeps it."""

    reads = True
    shards = False

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def keep(self, parameters: Sequence[nn.Parameter]) -> None:
        """They stay as they are."""


class Sharded:
    """Worker 0 reads each parameter; every worker keeps its shard of it.

    Attributes:
        device: Where parameters are.
        reads: Whether this is worker 0.
    """

    shards = True

    def __init__(self, device: torch.device, rank: int, shard: Callable[[nn.Module], None]) -> None:
        self.device = device
        self.reads = rank == 0
        self._shard = shard

    def keep(self, parameters: Sequence[nn.Parameter]) -> None:
        """Send worker 0's values to all, and leave each worker its shard."""
        self._shard(nn.ParameterList(parameters))


_current: ContextVar[Placement | None] = ContextVar("placement", default=None)


def current() -> Placement:
    """The placement of the construction under way; whole and on the host outside of any."""
    return _current.get() or Whole()


@contextmanager
def placing(placement: Placement) -> Iterator[None]:
    """Build models under a placement."""
    token = _current.set(placement)
    try:
        yield
    finally:
        _current.reset(token)
