"""MEDFuse's dense fusion, and the plain concatenation that it is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DenseFusion(nn.Module):
    """g(concat(f_a(s_a), s_c, f_b(s_b))) (Phan et al. 2024, section 3.3).

    f_a and f_b are a Linear and a GELU. g is a dense block (Huang et al. 2017): a hidden layer, and
    logits from its input and output together. The paper names no size.
    """

    def __init__(self, *, width: int, classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(width, width), nn.GELU())
        self.second = nn.Sequential(nn.Linear(width, width), nn.GELU())
        self.hidden = nn.Sequential(nn.Linear(3 * width, width), nn.GELU(), nn.Dropout(dropout))
        self.logits = nn.Linear(4 * width, classes)

    def forward(self, s_a: Tensor, s_b: Tensor, s_c: Tensor) -> Tensor:
        """Three times [B, D] to [B, C] logits."""
        final = torch.cat((self.first(s_a), s_c, self.second(s_b)), 1)
        logits: Tensor = self.logits(torch.cat((final, self.hidden(final)), 1))
        return logits


class ConcatPerceptron(nn.Module):
    """A network of one hidden layer on both vectors, each under a LayerNorm.

    The ablation without the disentangled transformer (Phan et al. 2024, Table 3).
    """

    def __init__(
        self, *, inputs: tuple[int, int], width: int, classes: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in inputs)
        self.network = nn.Sequential(
            nn.Linear(sum(inputs), width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width, classes),
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """[B, A] and [B, L] to [B, C] logits."""
        normed = (norm(x) for norm, x in zip(self.norms, (first, second), strict=True))
        logits: Tensor = self.network(torch.cat(tuple(normed), 1))
        return logits
