"""The focal loss: easy labels count less (Lin et al. 2017)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fusion.losses.rows import bce_by_class

if TYPE_CHECKING:
    from torch import Tensor


def focal_by_class(
    logits: Tensor, targets: Tensor, gamma: float = 2.0, alpha: float | None = None
) -> Tensor:
    """Eq 5 of Lin et al., elementwise: -alpha_t (1 - p_t)^gamma log p_t, >= 0.

    p_t is the probability of what is true. gamma 0 without alpha is binary cross-entropy.

    Args:
        logits: [B, C].
        targets: [B, C] 0 or 1.
        gamma: How much less a label counts that is already well predicted.
        alpha: Weight of the positives; the negatives get 1 - alpha. None weighs both by 1.
    """
    entropy = bce_by_class(logits, targets)
    # log(1 - p_t), so that the power is finite where p_t is 1 in float32.
    wrong = torch.nn.functional.logsigmoid(torch.where(targets > 0.5, -logits, logits).float())
    loss = (gamma * wrong).exp() * entropy
    if alpha is None:
        return loss
    return torch.where(targets > 0.5, alpha, 1.0 - alpha) * loss
