"""Masked lab-test modelling: the pre-training of MEDFuse's lab branch (Phan et al. 2024).

Section 3.2.2: a masked autoencoder of a row of lab results. The paper extends ReMasker (Du et al.,
ICLR 2024), from which its loss and output come; numbers that neither gives are documented choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from data.errors import InputError
from fusion.encoders.labs import LabEncoder, LabOptions, LabPositions, lab_blocks
from fusion.layers.present import present_labs
from fusion.model import FusionModel, Output, Term

if TYPE_CHECKING:
    from data.schema import Batch
    from data.tasks import TaskSpec


class MLTM(FusionModel, name="mltm"):
    """Results of a row are masked and told from the others; a linear probe reads the rest.

    A masked value is hidden as a missing one is, so a missing one is told in the same way. The loss
    is the mean squared error over the masked values plus that over those seen, missing ones in
    neither. The logits are a linear probe's on the row's vector, with nothing masked and no
    gradient beyond the probe: they say what the representation holds of the labels.

    Submodules: labs (the encoder), decoder, probe.
    """

    modalities = ("labs",)
    counted = ("masked", "seen")
    TINY: ClassVar = {"items": 6, "dim": 8, "heads": 2, "encoder_depth": 2, "decoder_depth": 1}

    class Config(LabOptions, FusionModel.Config):
        """Choices but for the 75 %; ReMasker's where it has one."""

        name: Literal["mltm"] = "mltm"
        items: int = Field(default=100, ge=1)
        """Columns of the lab matrix (K); at least `data.batches.labs.top`."""
        decoder_depth: int = Field(default=2, ge=1)
        """Layers of the decoder."""
        mask_ratio: float = Field(default=0.75, gt=0, lt=1)
        """Share of the values that is hidden."""
        reading: Literal["observed", "all"] = "observed"
        """Of what: of a row's observed values, one at least stays; or of all columns, the missing
        ones counted first, so that rows of few results lose none (ReMasker)."""

    def __init__(self, config: Config, task: TaskSpec) -> None:
        super().__init__(config, task)
        self.config = config
        self.labs = LabEncoder(config, config.items)
        self.decoder = LabDecoder(config, config.items, config.decoder_depth)
        self.probe = nn.Linear(config.dim, len(task.labels))

    def forward(self, batch: Batch) -> Output:
        """One pass over a batch.

        Raises:
            InputError: The shards hold no lab results, or more columns than the model.
        """
        if len(batch.labs) and not batch.labs.shape[1]:
            raise InputError(
                "mltm reads lab results, but these shards have none: extract them, or choose a "
                "model that reads what there is"
            )
        labs, observed = present_labs(batch, self.config.items)
        masked = self.mask(batch, observed)
        seen = observed & ~masked
        encoded = self.labs(labs, seen)
        told = self.decoder(encoded.tokens, encoded.mask).float()
        errors = (told - labs).square()
        terms = {
            name: Term(torch.where(which, errors, 0.0).sum())
            for name, which in (("masked", masked), ("seen", seen))
        }
        with torch.no_grad():
            vector = self.labs.pool(self.labs(labs, observed))
        return Output(self.probe(vector).float(), {"labs": vector}, terms)

    def mask(self, batch: Batch, observed: Tensor) -> Tensor:
        """[B, K] bool, True = observed but hidden; drawn from each row's word in the batch.

        Args:
            batch: The rows.
            observed: [B, K] bool.
        """
        words = [np.random.Philox(key=word).random_raw(self.config.items) for word in batch.draws]
        drawn = torch.from_numpy(np.array(words).astype(np.float64)).to(observed.device)
        # A row's observed values in a random order, the missing ones behind them.
        place = torch.where(observed, drawn, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
        hidden = self._hidden(observed.sum(1), batch.labs.shape[1])
        return observed & (place < hidden[:, None])

    def counts(self, batch: Batch) -> Tensor:
        """Values that are masked, and those that are seen."""
        _, observed = present_labs(batch, self.config.items)
        number = observed.sum(1)
        hidden = self._hidden(number, batch.labs.shape[1])
        return torch.stack((hidden.sum(), (number - hidden).sum())).double().cpu()

    def _hidden(self, observed: Tensor, columns: int) -> Tensor:
        """[B] how many of each row's `observed` [B] values are masked."""
        ratio = self.config.mask_ratio
        if self.config.reading == "observed":
            hidden = (ratio * observed.double()).round().long()
            return torch.minimum(hidden, (observed - 1).clamp(min=0))
        kept = max(1, int((1 - ratio) * columns + 1e-9))
        return (observed - kept).clamp(min=0)


class LabDecoder(nn.Module):
    """The value of every item from the tokens of those seen: a shallow Transformer.

    A learned token stands at each item that was not seen, whether masked or missing.
    """

    def __init__(self, options: LabOptions, items: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(options.dim, options.dim)
        self.unseen = nn.Parameter(torch.empty(options.dim).uniform_(-0.1, 0.1))
        self.positions = LabPositions(options, items)
        self.blocks = lab_blocks(options, depth)
        self.norm = nn.LayerNorm(options.dim)
        self.value = nn.Linear(options.dim, 1)

    def forward(self, encoded: Tensor, mask: Tensor) -> Tensor:
        """The encoder's [B, K + 1, D] tokens and [B, K + 1] mask to [B, K] values in (0, 1)."""
        embedded = self.embedding(encoded)
        unseen = self.unseen.to(embedded.dtype)
        tokens = torch.where(mask[:, :, None], embedded, unseen)
        states = torch.cat((tokens[:, :1], self.positions(tokens[:, 1:])), 1)
        for block in self.blocks:
            states = block(states)
        return self.value(self.norm(states[:, 1:])).squeeze(-1).tanh() / 2 + 0.5
