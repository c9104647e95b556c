"""Losses by row, and the way from rows to a term."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion.model import Term

if TYPE_CHECKING:
    from data.schema import Batch


def bce_by_class(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy -[y log p + (1 - y) log(1 - p)] from logits, elementwise, >= 0.

    DrFuse's Eq 9 and Eq 11 omit the minus sign, which taken literally rewards wrong predictions.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")


def rows_with(batch: Batch, over: tuple[str, ...]) -> Tensor:
    """[B] bool, True = the row has every modality in `over`."""
    rows = torch.ones(len(batch), dtype=torch.bool, device=batch.targets.device)
    for modality in over:
        rows = rows & batch.present[modality]
    return rows


def term(by_row: Tensor, batch: Batch, over: tuple[str, ...], scale: float = 1.0) -> Term:
    """The sum of [B] losses over the rows that have every modality in `over`."""
    return Term(torch.where(rows_with(batch, over), by_row, 0.0).sum(), over, scale)
