"""Pooling over time and over two shared representations."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion.layers.present import valid_steps


def masked_mean(sequence: Tensor, lengths: Tensor) -> Tensor:
    """[B, T, D] and [B] lengths (>= 1) to the [B, D] mean over each row's own steps."""
    valid = valid_steps(lengths, sequence.shape[1])[:, :, None]
    return torch.where(valid, sequence, 0.0).sum(1) / lengths[:, None].to(sequence.dtype)


def logit_pool(first: Tensor, second: Tensor) -> Tensor:
    """The logit of the mean of two Bernoulli probabilities given as logits (DrFuse Eq 2).

    log(2 e^(a+b) + e^a + e^b) - log(2 + e^a + e^b), as two logsumexp, which stays exact and has
    finite gradients where the mean of the probabilities rounds to 0 or 1. Computed in float32 at
    least; elementwise; the dtype of the result is that of `first`.
    """
    a, b = _wide(first), _wide(second)
    zero, both = torch.zeros_like(a), a + b
    numerator = torch.logsumexp(torch.stack((both, both, a, b)), 0)
    denominator = torch.logsumexp(torch.stack((zero, zero, a, b)), 0)
    return (numerator - denominator).to(first.dtype)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
