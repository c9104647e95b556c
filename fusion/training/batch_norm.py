"""Batch normalisation over the rows of all workers, on any device.

torch's own SyncBatchNorm runs on accelerators only, and it hangs when one worker's encoder has no
rows and therefore runs in evaluation mode; here that worker joins with zero rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fusion.collective import is_collective

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SynchronisedBatchNorm(_BatchNorm):
    """Normalises [N, C, ...] by the mean and variance over the N of all workers.

    In a training pass a module in evaluation mode still joins, with no rows of its own: it
    normalises by the running statistics, as it would alone, and keeps them equal to the others'.
    A frozen one (its weight takes no gradient) in evaluation mode stays as it is. Where all workers
    together have one row, there is no batch to speak of: the running statistics hold.
    """

    across_workers = True
    group: ProcessGroup | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, but got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise; same shape as the input."""
        self._check_input_dim(input)
        frozen = self.weight is not None and not self.weight.requires_grad
        if not is_collective() or (frozen and not self.training):
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        alone = None if self.training else self._by_running_statistics(input)
        shape = [1, -1] + [1] * (input.dim() - 2)
        axes = [0, *range(2, input.dim())]
        # Sums of squares lose digits far from zero; the running mean is the same on every worker.
        shift = self.running_mean.clone()
        values = input.float() - shift.view(shape)
        own = values if self.training else values * 0
        rows = len(input) if self.training else 0
        counts = own.new_tensor([rows * input[0, 0].numel(), rows])
        packed = torch.cat([own.sum(axes), own.square().sum(axes), counts])
        packed = all_reduce(packed, group=self.group)  # type: ignore[no-untyped-call]
        several = packed[-1].detach() > 1
        count = packed[-2].detach() * several
        mean, square = packed[:-2].view(2, -1) / count.clamp(min=1)
        variance = (square - mean.square()).clamp(min=0)
        mean = torch.where(several, mean, 0.0)
        variance = torch.where(several, variance, self.running_var.clone())
        self._update((mean + shift).detach(), variance.detach(), count)
        if alone is not None:
            return alone + 0 * packed.sum()
        scaled = (values - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            scaled = scaled * self.weight.view(shape) + self.bias.view(shape)
        return scaled.to(input.dtype)

    def _by_running_statistics(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, variance = self.running_mean.clone(), self.running_var.clone()
        return F.batch_norm(input, mean, variance, self.weight, self.bias, eps=self.eps)

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        seen = (count > 0).to(mean.dtype)
        self.num_batches_tracked += (count > 0).to(self.num_batches_tracked.dtype)
        # momentum=None is the cumulative average.
        tracked = self.num_batches_tracked.clamp(min=1)
        momentum = 1 / tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, seen * momentum)
        self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), seen * momentum)


def synchronise(module: nn.Module, group: ProcessGroup | None) -> None:
    """Replace every batch norm below `module`, keeping its parameters, buffers and names."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and child.track_running_stats:
            setattr(module, name, _converted(child, group))
        else:
            synchronise(child, group)


def _converted(source: _BatchNorm, group: ProcessGroup | None) -> SynchronisedBatchNorm:
    target = SynchronisedBatchNorm(
        source.num_features,
        source.eps,
        source.momentum,
        source.affine,
        source.track_running_stats,
    )
    for name, parameter in source._parameters.items():
        target._parameters[name] = parameter
    for name, buffer in source._buffers.items():
        target._buffers[name] = buffer
    target.training = source.training
    target.group = group
    return target
