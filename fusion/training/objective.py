"""From a step's rows to its loss: counting, cutting, weighing.

A term is a sum over rows. Its mean divides by the rows of the whole step, over all workers and
micro-batches, that the term counts; the census taken before the forward pass knows them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from data.schema import MODALITIES, N_FEATURES, Batch
from fusion.collective import collective_statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from data.tasks import TaskSpec
    from fusion.model import FusionModel, Phase, Term
    from fusion.tasks import Task
    from fusion.training.config import TrainConfig

N_PATTERNS = 2 ** len(MODALITIES)


@dataclass(frozen=True)
class MicroBatch:
    """A part of a worker's share of a step.

    Attributes:
        batch: Its rows, or a placeholder's.
        weight: 1, or 0 for a placeholder: every worker runs the same passes in the same order,
            whether it has rows or not, but only rows count.
    """

    batch: Batch
    weight: float = 1.0


def census(share: Batch | None, model: FusionModel) -> Tensor:
    """[2^M + N] float64: how many rows have each pattern of the M modalities, and N values.

    Bit m of a pattern is modality m; the values are those of the model's counted terms.
    """
    if share is None:
        return torch.zeros(N_PATTERNS + len(model.counted), dtype=torch.float64)
    pattern = torch.zeros(len(share), dtype=torch.int64)
    for bit, modality in enumerate(MODALITIES):
        if modality in share.present:
            pattern += share.present[modality].cpu().long() << bit
    return torch.cat((torch.bincount(pattern, minlength=N_PATTERNS).double(), model.counts(share)))


def population(counts: Tensor, over: tuple[str, ...]) -> Tensor:
    """Scalar: the rows of a census that have every modality in `over`."""
    needed = sum(1 << MODALITIES.index(modality) for modality in over)
    patterns = torch.arange(N_PATTERNS, device=counts.device)
    return torch.where((patterns & needed) == needed, counts[:N_PATTERNS], 0.0).sum()


def placeholder(spec: TaskSpec, image_shape: Sequence[int]) -> Batch:
    """Two constant rows without any modality: what a worker runs whose share is empty."""
    return Batch(
        ehr=torch.zeros(2, 1, N_FEATURES),
        lengths=torch.ones(2, dtype=torch.int64),
        cxr=torch.zeros(0, *image_shape),
        cxr_index=torch.zeros(0, dtype=torch.int64),
        present={modality: torch.zeros(2, dtype=torch.bool) for modality in MODALITIES},
        targets=torch.zeros(2, len(spec.labels)),
        cxr_targets=torch.zeros(0, 14),
        rows=np.zeros(0, np.int64),
        draws=np.zeros(2, np.uint64),
    )


def even(rows: int, parts: int) -> list[list[int]]:
    """Rows in `parts` runs as even as may be; some are empty where there are fewer rows."""
    borders = [round(part * rows / parts) for part in range(parts + 1)]
    return [list(range(*pair)) for pair in pairwise(borders)]


def groups(model: FusionModel, config: TrainConfig, share: Batch | None) -> list[list[int]]:
    """A share's rows by micro-batch: as the model's tokens ask for, or `accumulation` parts."""
    if share is None:
        return [[]]
    by_tokens = model.passes(share, config.tokens_per_pass) if config.tokens_per_pass else None
    return even(len(share), config.accumulation) if by_tokens is None else by_tokens


def cut(share: Batch | None, pieces: list[list[int]], filler: Batch) -> list[MicroBatch]:
    """A share's rows in `pieces`, each rising; empty ones run the filler."""
    return [
        MicroBatch(_rows(share, group)) if share is not None and group else MicroBatch(filler, 0.0)
        for group in pieces
    ]


def _rows(batch: Batch, piece: list[int]) -> Batch:
    if len(piece) == len(batch):
        return batch
    place = torch.full((len(batch),), -1)
    place[piece] = torch.arange(len(piece))
    place = place.to(batch.cxr_index.device)
    images, noted = place[batch.cxr_index] >= 0, place[batch.notes_index] >= 0
    texts = zip(batch.notes, noted.tolist(), strict=True)
    lengths = batch.lengths[piece]
    return replace(
        batch,
        ehr=batch.ehr[piece, : int(lengths.max())],
        lengths=lengths,
        cxr=batch.cxr[images],
        cxr_index=place[batch.cxr_index[images]],
        present={name: mask[piece] for name, mask in batch.present.items()},
        targets=batch.targets[piece],
        cxr_targets=batch.cxr_targets[images],
        rows=batch.rows[piece],
        notes=tuple(text for text, inside in texts if inside),
        notes_index=place[batch.notes_index[noted]],
        lab_texts=tuple(batch.lab_texts[row] for row in piece) if batch.lab_texts else (),
        labs=batch.labs[piece] if len(batch.labs) else batch.labs,
        labs_observed=batch.labs_observed[piece] if len(batch.labs) else batch.labs_observed,
        draws=batch.draws[piece] if len(batch.draws) else batch.draws,
    )


class Objective(nn.Module):
    """A model with its task: forward gives the loss, so that a wrapper sees what is minimised."""

    def __init__(self, model: FusionModel, task: Task, config: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.config = config

    def forward(
        self, micro: MicroBatch, counts: Tensor, phase: Phase
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """This micro-batch's part of the step's loss.

        Args:
            micro: Rows on the model's device.
            counts: The step's census over all workers.
            phase: Which terms to minimise, and what share of their weights.

        Returns:
            The loss, a scalar whose sum over workers and micro-batches is the step's, and for
            each term its detached sum here and its rows, or values, in the whole step.

        Raises:
            KeyError: The phase names a term that the model does not give.
        """
        batch = micro.batch
        with autocast(batch.targets.device, self.config), collective_statistics():
            output = self.model(images_last(batch, self.config))
        terms = {"task": self.task.loss(output.logits.float(), batch), **output.terms}
        loss = torch.zeros((), device=batch.targets.device)
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        for name in phase.terms or terms:
            term = terms[name]
            total = term.sum.float() * micro.weight
            rows = self._number(name, term, counts)
            scale = term.scale * phase.shares.get(name, 1.0)
            loss = loss + scale * total / rows.clamp(min=1).float()
            sums[name] = (total.detach(), rows)
        return loss, sums

    def _number(self, name: str, term: Term, counts: Tensor) -> Tensor:
        """What a term's sum over the whole step is divided by."""
        if name in self.model.counted:
            return counts[N_PATTERNS + self.model.counted.index(name)]
        return population(counts, term.over)


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """bfloat16 autocast where the precision asks for it."""
    enabled = config.precision == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def images_last(batch: Batch, config: TrainConfig) -> Batch:
    """The batch with its images in channels-last memory where the config asks for it.

    Outputs of an encoder in their place ([P, ...]) stay as they are.
    """
    if not config.channels_last or batch.cxr.dim() != 4:
        return batch
    return replace(batch, cxr=batch.cxr.contiguous(memory_format=torch.channels_last))
