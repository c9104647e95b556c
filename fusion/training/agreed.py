"""Errors that every worker raises alike, so that none waits for another."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from data.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusion.training.strategy import Strategy

T = TypeVar("T")


class AgreedError(InputError):
    """Raised on every worker alike, so that none waits for another."""


def agreed(strategy: Strategy, body: Callable[[], T]) -> T:
    """The value of `body`, which every worker runs and which waits for no other worker.

    Raises:
        AgreedError: It was wrong input on some worker: the first one's error.
    """
    value, fault = None, None
    try:
        value = body()
    except InputError as error:
        fault = str(error)
    faults = [each for each in strategy.gather(fault) if each is not None]
    if faults:
        raise AgreedError(faults[0])
    return value  # type: ignore[return-value]
