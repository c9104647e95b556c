"""The focal loss: easy labels count less (Lin et al. 2017)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from data.config import Config
from data.errors import InputError
from fusion.losses.rows import bce_by_class, term

if TYPE_CHECKING:
    from torch import Tensor

    from data.schema import Batch
    from data.tasks import TaskSpec
    from fusion.model import Term


class FocalOptions(Config):
    """The objective of multi-label models; MEDFuse's paper names focal loss without its numbers."""

    loss: Literal["focal", "bce"] = "focal"
    """What is minimised; the validation loss is binary cross-entropy in any case."""
    focal_gamma: float = Field(default=2.0, ge=0)
    """0 is binary cross-entropy."""
    focal_alpha: Annotated[float, Field(gt=0, lt=1)] | Literal["prevalence"] | None = None
    """Weight of the positives, the negatives getting the rest of 1; `prevalence`: of each label the
    share of train rows without it. null weighs both by 1."""

    @property
    def term(self) -> str:
        """The name of the term that is minimised."""
        return "focal" if self.loss == "focal" else "task"


def focal_terms(
    logits: Tensor, batch: Batch, options: FocalOptions, task: TaskSpec
) -> dict[str, Term]:
    """The term `focal`, the mean over labels of each row; none where the task's loss is wanted.

    Raises:
        InputError: Labels are to be weighed by a prevalence that the task does not know.
    """
    if options.loss != "focal":
        return {}
    alpha: float | Tensor | None
    if options.focal_alpha == "prevalence":
        if not task.prevalence:
            raise InputError(
                f"model.focal_alpha=prevalence: no train rows tell how frequent the labels of "
                f"{task.name} are; set a number"
            )
        alpha = 1.0 - logits.new_tensor(task.prevalence)
    else:
        alpha = options.focal_alpha
    by_class = focal_by_class(logits, batch.targets, options.focal_gamma, alpha)
    return {"focal": term(by_class.mean(1), batch, ())}


def focal_by_class(
    logits: Tensor, targets: Tensor, gamma: float = 2.0, alpha: float | Tensor | None = None
) -> Tensor:
    """Eq 5 of Lin et al., elementwise: -alpha_t (1 - p_t)^gamma log p_t, >= 0.

    p_t is the probability of what is true. gamma 0 without alpha is binary cross-entropy.

    Args:
        logits: [B, C].
        targets: [B, C] 0 or 1.
        gamma: How much less a label counts that is already well predicted.
        alpha: Weight of the positives, or [C] of each label's; the negatives get 1 - alpha. None
            weighs both by 1.
    """
    entropy = bce_by_class(logits, targets)
    # log(1 - p_t), so that the power is finite where p_t is 1 in float32.
    wrong = torch.nn.functional.logsigmoid(torch.where(targets > 0.5, -logits, logits).float())
    loss = (gamma * wrong).exp() * entropy
    if alpha is None:
        return loss
    return torch.where(targets > 0.5, alpha, 1.0 - alpha) * loss
