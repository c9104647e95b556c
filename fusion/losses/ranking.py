"""DrFuse's attention ranking loss: the better a representation predicts, the more attention."""

from __future__ import annotations

from itertools import combinations

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


def pairwise_margin_ranking(attention: Tensor, losses: Tensor, margin: float = 0.0) -> Tensor:
    """The released code's form, for comparison: no mean over rows, so not a term of training.

    For each unordered pair a margin ranking loss whose target is the sign of the difference of
    losses, summed over all rows and classes and divided by the number of entries above zero; then
    the mean over pairs. It differs from `attention_ranking` by that divisor, which depends on the
    data of all rows at once.

    Args:
        attention: [B, C, N] weights of the paired rows.
        losses: [B, C, N] loss of each representation's own head.
        margin: The code's value is 0.

    Returns:
        A scalar, >= 0.
    """
    fixed = losses.detach()
    pairs = []
    for i, j in combinations(range(attention.shape[-1]), 2):
        target = torch.sign(fixed[..., j] - fixed[..., i])
        entries = (margin - target * (attention[..., i] - attention[..., j])).clamp_min(0.0)
        pairs.append(entries.sum() / (entries > 0).sum().clamp_min(1))
    return torch.stack(pairs).mean()
