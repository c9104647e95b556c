"""Disentanglement by orthogonality."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6


def absolute_cosine(first: Tensor, second: Tensor) -> Tensor:
    """|cos| of two [B, D] representations by row (DrFuse Eq 4): [B] in [0, 1].

    A small constant is added to each norm, so that a row of zeros gives 0 and a finite gradient.
    """
    dtype = torch.promote_types(first.dtype, torch.float32)
    a, b = first.to(dtype), second.to(dtype)
    norms = (a.norm(dim=-1) + EPSILON) * (b.norm(dim=-1) + EPSILON)
    return ((a * b).sum(-1) / norms).abs()
