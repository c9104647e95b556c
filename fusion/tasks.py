"""A task's loss and probabilities, for the TaskSpec of data/."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from fusion.model import Term

if TYPE_CHECKING:
    from torch import Tensor

    from data.schema import Batch
    from data.tasks import TaskSpec


class Task:
    """Binary and multi-label tasks: C independent Bernoulli outputs, BCE on logits."""

    def __init__(self, spec: TaskSpec) -> None:
        self.spec = spec

    def loss(self, logits: Tensor, batch: Batch) -> Term:
        """Binary cross-entropy, averaged over classes, summed over rows ([B, C] -> scalar)."""
        elements = F.binary_cross_entropy_with_logits(logits, batch.targets, reduction="none")
        return Term(elements.mean(1).sum())

    def probabilities(self, logits: Tensor) -> Tensor:
        """[B, C] logits to [B, C] probabilities."""
        return torch.sigmoid(logits.float())
