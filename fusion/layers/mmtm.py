"""The multimodal transfer module (Joze et al. 2020), as MedFuse's comparison uses it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TransferModule(nn.Module):
    """Squeeze two modalities together, and gate the channels of each by what both hold.

    squeeze: [B, V + S] -> Linear -> ReLU of width 2 (V + S) / ratio; excite: one Linear and a
    sigmoid per modality. The MMTM paper doubles the gate; its code and MedFuse's do not, nor does
    this.
    """

    def __init__(self, *, visual: int, series: int, ratio: int = 4) -> None:
        super().__init__()
        width = 2 * (visual + series) // ratio
        self.squeeze = nn.Linear(visual + series, width)
        self.visual_gate = nn.Linear(width, visual)
        self.series_gate = nn.Linear(width, series)

    def forward(self, visual: Tensor, series: Tensor) -> tuple[Tensor, Tensor]:
        """[B, V] pooled map and [B, S] mean over time to their gates in (0, 1), same shapes."""
        squeezed = torch.relu(self.squeeze(torch.cat((visual, series), 1)))
        return torch.sigmoid(self.visual_gate(squeezed)), torch.sigmoid(self.series_gate(squeezed))
