"""The LSTM of every model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LSTM(nn.LSTM):
    """PyTorch's, computing in float32 on a CPU whatever the autocast.

    A bfloat16 LSTM is refused by oneDNN on CPUs without AVX-512 or AMX, so that the same run would
    start on one machine and fail on another. On a GPU the autocast holds.
    """

    def forward(self, series: Tensor | nn.utils.rnn.PackedSequence, hidden: Any = None) -> Any:
        """As `torch.nn.LSTM`: [B, T, F] or packed, and the states to begin from."""
        if self.all_weights[0][0].device.type != "cpu":
            return super().forward(series, hidden)
        with torch.autocast("cpu", enabled=False):
            return super().forward(series.to(torch.float32), hidden)
