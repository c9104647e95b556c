"""A missing modality is a mask: the one place where rows without a modality are handled.

Every rank must call every submodule in the same order in every step, whatever its rows hold. So an
encoder without rows still runs, on two constant rows whose output is multiplied by zero, with
batch norm reading its running statistics; otherwise only the rows that have the modality are
encoded, and their outputs scattered to the batch.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from data.schema import Batch

MissingImage = Literal["not_encoded", "zero_image"]
"""A missing image is never encoded, or (MedFuse's released code) a zero image is."""

STAND_INS = 2


@dataclass(frozen=True)
class PresentRows:
    """What an encoder gets of a modality, and the way back to the rows of the batch.

    Attributes:
        values: [N, ...] the P rows present; without any, constant stand-ins.
        index: [P] int64, the batch row of each.
        available: [B] bool, True = the scattered output holds something for this row.
        stands_in: No row is present: `values` are stand-ins and count for nothing.
    """

    values: Tensor
    index: Tensor
    available: Tensor
    stands_in: bool

    def scatter(self, encoded: Tensor) -> Tensor:
        """[N, ...] encoded rows to [B, ...]; rows that are not available hold zeros."""
        empty = encoded.new_zeros(len(self.available), *encoded.shape[1:])
        if self.stands_in:
            return empty + 0.0 * encoded.sum()
        rows = empty.index_copy(0, self.index, encoded)
        return torch.where(_over_rows(self.available, rows), rows, 0.0)

    def gather(self, rows: Tensor) -> Tensor:
        """[B, ...] to the [N, ...] rows that are encoded."""
        if self.stands_in:
            return rows[:1].expand(len(self.values), *rows.shape[1:])
        return rows[self.index]


@contextmanager
def present_images(
    batch: Batch, encoder: nn.Module, missing: MissingImage = "not_encoded"
) -> Iterator[PresentRows]:
    """The images to encode, with `encoder`'s batch norms made safe for their number.

    With fewer than two images batch norm has no batch to speak of, so it is in evaluation mode: it
    reads its running statistics and does not move them. One that sees the rows of all workers takes
    a single image too, and counts for itself.

    Args:
        batch: P images of B rows.
        encoder: The module that will see them.
        missing: `zero_image` gives every row without an image a zero image to encode.
    """
    images, index = batch.cxr, batch.cxr_index
    available = batch.present["cxr"]
    if missing == "zero_image":
        dense = images.new_zeros(len(batch), *images.shape[1:])
        images = dense.index_copy(0, index, images)
        index = torch.arange(len(batch), device=images.device)
        available = torch.ones_like(available)
    stands_in = len(index) == 0
    if stands_in:
        images = images.new_zeros(STAND_INS, *images.shape[1:])
    with _steady_norms(encoder, steady=stands_in, few=len(index) < STAND_INS):
        yield PresentRows(images, index, available, stands_in)


def present_series(batch: Batch) -> tuple[Tensor, Tensor]:
    """The time series with everything that must not be read set to a constant.

    Rows without a series become one step of zeros, and steps beyond a row's length zeros, so that
    no encoder can depend on their content. The caller drops what is encoded for absent rows
    (`keep_present`).

    Returns:
        [B, T, F] series and [B] int64 lengths, >= 1.
    """
    present = batch.present["ehr"]
    lengths = torch.where(present, batch.lengths, 1)
    valid = valid_steps(batch.lengths, batch.ehr.shape[1]) & present[:, None]
    return torch.where(valid[:, :, None], batch.ehr, 0.0), lengths


def present_labs(batch: Batch, items: int) -> tuple[Tensor, Tensor]:
    """The lab matrix of a model of `items` columns.

    A batch of fewer columns (a train split may lack items; a placeholder has none) gets columns
    that nobody has; a row without labs has none observed, and unobserved values are zero.

    Returns:
        [B, items] float32 values and [B, items] bool, True = observed.

    Raises:
        InputError: The batch has more columns than the model.
    """
    columns = batch.labs.shape[1]
    if columns > items:
        raise InputError(
            f"the lab matrix has {columns} columns, but the model reads {items}: set model.items "
            "to at least data.batches.labs.top"
        )
    values = batch.targets.new_zeros(len(batch), items)
    observed = torch.zeros_like(values, dtype=torch.bool)
    if len(batch.labs):
        observed[:, :columns] = batch.labs_observed & batch.present["labs"][:, None]
        values[:, :columns] = torch.where(observed[:, :columns], batch.labs, 0.0)
    return values, observed


class StandIn(nn.Module):
    """A learned vector for rows that lack a modality."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.empty(width).uniform_(-0.1, 0.1))

    def forward(self, encoded: Tensor, available: Tensor) -> Tensor:
        """[B, D] with the vector where `available` ([B] bool) is False."""
        return torch.where(available[:, None], encoded, self.vector.to(encoded.dtype))


def keep_present(encoded: Tensor, present: Tensor) -> Tensor:
    """[B, ...] with the rows where `present` ([B] bool) is False set to zero."""
    return torch.where(_over_rows(present, encoded), encoded, 0.0)


def valid_steps(lengths: Tensor, steps: int) -> Tensor:
    """[B, T] bool, True = a step within its row's length."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


def _over_rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (like.dim() - 1))


@contextmanager
def _steady_norms(encoder: nn.Module, *, steady: bool, few: bool) -> Iterator[None]:
    norms = [
        module
        for module in encoder.modules()
        if isinstance(module, _BatchNorm)
        and module.training
        and (steady or (few and not getattr(module, "across_workers", False)))
    ]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()
