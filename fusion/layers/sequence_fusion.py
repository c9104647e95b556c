"""MedFuse's fusion module: an LSTM over the modalities at hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusion.layers.present import keep_present
from fusion.layers.recurrent import LSTM


class SequenceFusion(nn.Module):
    """A single-layer LSTM over the sequence [v_ehr, phi(v_cxr)] (MedFuse, section 3.2).

    The sequence of a row holds only the modalities it has, the series first: length 2, or 1. The
    released code's squeeze of the hidden state breaks a batch of one row; here it is indexed.
    Default PyTorch initialisation: 1,576,960 parameters at 256 -> 512.
    """

    def __init__(self, *, inputs: int = 256, hidden: int = 512) -> None:
        super().__init__()
        self.lstm = LSTM(inputs, hidden, batch_first=True)

    def forward(self, ehr: Tensor, cxr: Tensor, has_ehr: Tensor, has_cxr: Tensor) -> Tensor:
        """Two [B, D] tokens and their [B] bool masks to the [B, H] state after the last token.

        A row with neither token has a state of zeros.
        """
        tokens = torch.stack((torch.where(has_ehr[:, None], ehr, cxr), cxr), 1)
        states, _ = self.lstm(tokens)
        last = torch.where((has_ehr & has_cxr)[:, None], states[:, 1], states[:, 0])
        return keep_present(last, has_ehr | has_cxr)
