"""Activation checkpointing: blocks whose inner activations are computed again in the backward pass.

The second pass must be the first one again: with the training flags and batch-norm statistics it
had, moving no statistic a second time. Torch itself restores the generators and the autocast.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fusion.collective import collective_statistics, is_collective

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_WHOLE = (nn.RNNBase, nn.TransformerEncoderLayer)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that are recomputed, none inside another.

    They are those that stand in a list or sequence and are composed of others with parameters (a
    residual block, a decoder layer), recurrent layers, and Transformer layers wherever they are.
    """
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, _WHOLE) or (isinstance(model, _CONTAINERS) and _composed(child)):
            found.append(child)
        else:
            found += blocks(child)
    return found


def recompute(model: nn.Module) -> None:
    """Keep of each block of a model only its inputs until the backward pass."""
    for block in blocks(model):
        block.forward = _Recomputed(block, block.forward)


class _Recomputed:
    """A block's forward pass, once for its result and again for its gradients."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        self._block = block
        self._forward = forward

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*inputs, **options)
        # To its very end, so that every worker takes part in every collective of the block.
        with set_checkpoint_early_stop(False):
            return checkpoint(
                self._run, *inputs, use_reentrant=False, context_fn=self._contexts, **options
            )

    def _run(self, *inputs: Any, **options: Any) -> Any:
        return _recomputed_first(self._forward(*inputs, **options))

    def _contexts(self) -> tuple[Any, Any]:
        modes = {module: module.training for module in self._block.modules()}
        buffers = {
            (module, name): buffer.clone()
            for module in self._block.modules()
            for name, buffer in module.named_buffers(recurse=False)
        }
        return nullcontext(), _as_it_was(modes, buffers, is_collective())


class _Saving(torch.autograd.Function):
    """The identity, whose backward pass asks for a saved tensor."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        """The value itself."""
        context.save_for_backward(value.new_empty(0))
        return value.view_as(value)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        """The gradient itself, once the block has run again."""
        _ = context.saved_tensors
        return gradient


def _recomputed_first(output: Any) -> Any:
    """The output, such that its block runs again before the backward pass enters the block.

    ZeRO-3 gathers a module's parameters when the backward pass enters it; a forward pass inside it
    would release them again.
    """
    if isinstance(output, torch.Tensor):
        return _Saving.apply(output)
    if type(output) in (tuple, list):
        return type(output)(_recomputed_first(part) for part in output)
    return output


@contextmanager
def _as_it_was(
    modes: dict[nn.Module, bool], buffers: dict[tuple[nn.Module, str], Tensor], collective: bool
) -> Iterator[None]:
    now = {module: module.training for module in modes}
    moved = {(module, name): getattr(module, name) for module, name in buffers}
    try:
        for module, training in modes.items():
            module.training = training
        for (module, name), buffer in buffers.items():
            setattr(module, name, buffer)
        with collective_statistics() if collective else nullcontext():
            yield
    finally:
        for module, training in now.items():
            module.training = training
        for (module, name), buffer in moved.items():
            setattr(module, name, buffer)


def _composed(module: nn.Module) -> bool:
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and any(
        list(child.parameters()) for child in module.children()
    )
