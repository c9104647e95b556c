"""DrFuse's disease-aware masked attention (section 3.4) and its class-wise heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DiseaseAttention(nn.Module):
    """One query per row, one key per representation and class (DrFuse Eq 5-8).

    A single Linear gives q, v and k_1 .. k_C of every representation, as in the released code. The
    query is the mean of q over the representations at hand. Eq 7 adds a mask of {1, -inf} before
    the division by sqrt(d): a constant does not change a softmax, so the mask here is {0, -inf}.
    """

    def __init__(self, *, width: int, classes: int) -> None:
        super().__init__()
        self.width, self.classes = width, classes
        self.projection = nn.Linear(width, (2 + classes) * width)

    def forward(self, representations: Tensor, available: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, D] and [B, N] bool, at least one True in a row.

        Returns:
            [B, C, D] one fused representation per class, and [B, C, N] attention, whose weight on
            an unavailable representation is exactly 0.
        """
        B, N, _ = representations.shape
        projected = self.projection(representations).view(B, N, 2 + self.classes, self.width)
        query, value, keys = projected[:, :, 0], projected[:, :, 1], projected[:, :, 2:]
        weights = available[:, :, None].to(query.dtype)
        mean_query = (query * weights).sum(1) / weights.sum(1)
        scores = torch.einsum("bd,bncd->bcn", mean_query, keys) / self.width**0.5
        scores = scores.float().masked_fill(~available[:, None, :], float("-inf"))
        attention = scores.softmax(-1)
        fused = torch.einsum("bcn,bnd->bcd", attention.to(value.dtype), value)
        return fused, attention


class ClasswiseHead(nn.Module):
    """A linear head for each class on its own representation: logit_c = w_c . h_c + b_c."""

    def __init__(self, *, width: int, classes: int) -> None:
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(classes, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(classes).uniform_(-bound, bound))

    def forward(self, fused: Tensor) -> Tensor:
        """[B, C, D] to [B, C] logits."""
        return (fused * self.weight).sum(-1) + self.bias
