"""Gradients in one order on every worker, whatever path a worker's rows took through the model.

ZeRO-2 and 3 pack gradients into buckets as they arrive and reduce a bucket once it is full. Workers
that ran different graphs (one without images, say) would pack different buckets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn


class GradientOrder:
    """Hands each gradient on when all before it have been, and zeros for those that never come.

    The order is that in which DistributedDataParallel fills its buckets, the reverse of the
    parameters' declaration: for a model that calls its submodules in the order it declares them,
    nearly every gradient goes straight through, and the others wait where they are. Gradients of
    parameters that the phase at hand does not update are dropped.
    """

    def __init__(
        self,
        phases: Sequence[Sequence[nn.Parameter]],
        hand_over: Callable[[nn.Parameter], None],
    ) -> None:
        """Order the parameters of each phase.

        Args:
            phases: The parameters that each updates, as the model declares them.
            hand_over: Takes a parameter with its gradient.
        """
        self._phases = [list(reversed(parameters)) for parameters in phases]
        self._hand_over = hand_over
        self._due: list[nn.Parameter] = []
        self._expected: set[int] = set()
        self._arrived: set[int] = set()
        self._next = 0

    def start(self, phase: int) -> None:
        """A backward pass of a phase is to come."""
        self._due = self._phases[phase]
        self._expected = {id(parameter) for parameter in self._due}
        self._arrived = set()
        self._next = 0

    def arrive(self, parameter: nn.Parameter) -> None:
        """A parameter's gradient is whole on this worker."""
        if id(parameter) not in self._expected:
            parameter.grad = None
            return
        self._arrived.add(id(parameter))
        while self._next < len(self._due) and id(self._due[self._next]) in self._arrived:
            self._pass_on()

    def finish(self) -> None:
        """The backward pass is over: what has not come is zero here."""
        while self._next < len(self._due):
            parameter = self._due[self._next]
            if parameter.grad is None:
                shape = getattr(parameter, "ds_shape", parameter.shape)
                parameter.grad = torch.zeros_like(parameter)
                # A partitioned parameter is empty by now, but its gradient is whole.
                parameter.grad.data = torch.zeros(
                    shape, dtype=parameter.dtype, device=parameter.device
                )
            self._pass_on()

    def _pass_on(self) -> None:
        parameter = self._due[self._next]
        self._next += 1
        self._hand_over(parameter)
