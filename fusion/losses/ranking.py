"""DrFuse's attention ranking loss: the better a representation predicts, the more attention."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_ranking(attention: Tensor, losses: Tensor, margin: float = 0.0) -> Tensor:
    """DrFuse Eq 10, mended: the indicator selects pairs instead of shifting them.

    1/(2C) sum_c sum_i sum_{j != i} [l_ci < l_cj] max(0, a_cj - a_ci + margin). As printed, with
    the indicator inside the maximum and the margin outside it, three of six pairs are the constant
    `margin`. The losses only rank: they receive no gradient.

    Args:
        attention: [B, C, N] weights.
        losses: [B, C, N] loss of each representation's own head.
        margin: By how much the better one must lead.

    Returns:
        [B], >= 0.
    """
    better = losses.detach()[..., :, None] < losses.detach()[..., None, :]
    gap = attention[..., None, :] - attention[..., :, None] + margin
    return torch.where(better, gap.clamp_min(0.0), 0.0).sum((-2, -1)).mean(-1) / 2
