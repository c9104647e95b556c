"""The dynamic affine feature map transform (Polsterl et al. 2021), turned as MedFuse turns it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AffineTransform(nn.Module):
    """An affine map of each channel of the series, computed from image and series.

    [B, V + S] -> Linear (no bias) to int((16 + V) / 7) -> ReLU -> Linear (no bias) -> scale, shift.
    The original modulates image features by tabular data; here the image modulates the series.
    The scale is linear and has no one added to it.
    """

    def __init__(self, *, visual: int, series: int) -> None:
        super().__init__()
        bottleneck = (16 + visual) // 7
        self.squeeze = nn.Linear(visual + series, bottleneck, bias=False)
        self.affine = nn.Linear(bottleneck, 2 * series, bias=False)

    def forward(self, visual: Tensor, series: Tensor) -> tuple[Tensor, Tensor]:
        """[B, V] pooled map and [B, S] mean over time to [B, S] scale and shift."""
        squeezed = torch.relu(self.squeeze(torch.cat((visual, series), 1)))
        scale, shift = self.affine(squeezed).chunk(2, 1)
        return scale, shift
