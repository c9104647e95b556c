"""Fusion by concatenation, with a stand-in vector for a missing image."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class ConcatFusion(nn.Module):
    """Linear on [v_ehr, phi(v_cxr)] (MedFuse, section 4.3: early and joint fusion).

    A row without an image gets a learned vector (drawn from U[0, 1)) in the place of phi(v_cxr),
    or zeros (the paper's Table A2). A row without a series has zeros for v_ehr.
    """

    def __init__(
        self,
        *,
        series: int,
        visual: int,
        classes: int,
        missing: Literal["learned", "zeros"] = "learned",
    ) -> None:
        super().__init__()
        self.projection = nn.Linear(visual, series)
        self.missing = nn.Parameter(torch.rand(series)) if missing == "learned" else None
        self.head = nn.Linear(2 * series, classes)

    def forward(self, ehr: Tensor, projected: Tensor, available: Tensor) -> Tensor:
        """[B, S], [B, S] and [B] bool (True = has an image) to [B, C] logits."""
        if self.missing is not None:
            stand_in = self.missing.to(projected.dtype)
            projected = torch.where(available[:, None], projected, stand_in)
        return self.head(torch.cat((ehr, projected), 1))
