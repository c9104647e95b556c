"""The unified network (Hayat et al. 2021), a baseline of MedFuse. A RECONSTRUCTION.

Its training code was never released and the comparison does not describe it, so this is our
reading: three heads trained together on whatever rows have what each needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from data.tasks import CHEXPERT_LABELS
from fusion.encoders.image import ImageOptions, MissingImageOptions, build_resnet
from fusion.encoders.time_series import LSTMEncoder, LSTMOptions
from fusion.layers.present import keep_present, present_images, present_series
from fusion.losses.rows import bce_by_class, term
from fusion.model import FusionModel, Output, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from data.schema import Batch
    from data.tasks import TaskSpec
    from fusion.model import Term


class Unified(FusionModel, name="unified"):
    """g_ehr on v_ehr, g_cxr (14 radiology labels) on v_cxr, g_fused on [v_ehr, phi(v_cxr)].

    A step minimises the sum of three mean BCEs: `ehr` over rows with a series, `cxr` over rows
    with an image, `fused` over rows with both. A paired row is predicted by g_fused, any other by
    g_ehr (its bias where the series is missing).

    Submodules: ehr_encoder, cxr_encoder, projection, ehr_head, cxr_head, fused_head.
    """

    modalities = ("ehr", "cxr")
    image_encoder = "cxr_encoder"
    phases = (Phase(terms=("ehr", "cxr", "fused")),)
    TINY: ClassVar = {"hidden": 8, "depth": 10, "base_width": 4}

    class Config(LSTMOptions, ImageOptions, MissingImageOptions, FusionModel.Config):
        """MedFuse's numbers for the encoders."""

        name: Literal["unified"] = "unified"

    def __init__(self, config: Config, task: TaskSpec) -> None:
        super().__init__(config, task)
        self.missing_image = config.missing_image
        self.ehr_encoder = LSTMEncoder(hidden=config.hidden, dropout=config.dropout)
        self.cxr_encoder = build_resnet(config.depth, config.base_width, config.image_weights)
        self.projection = nn.Linear(self.cxr_encoder.channels, config.hidden)
        self.ehr_head = nn.Linear(config.hidden, len(task.labels))
        self.cxr_head = nn.Linear(self.cxr_encoder.channels, len(CHEXPERT_LABELS))
        self.fused_head = nn.Linear(2 * config.hidden, len(task.labels))

    def forward(self, batch: Batch) -> Output:
        """One pass over a batch."""
        has_ehr, has_cxr = batch.present["ehr"], batch.present["cxr"]
        ehr = keep_present(self.ehr_encoder(*present_series(batch)), has_ehr)
        with present_images(batch, self.cxr_encoder, self.missing_image) as images:
            cxr = images.scatter(self.cxr_encoder(images.values))
        ehr_logits, radiology = self.ehr_head(ehr), self.cxr_head(cxr)
        fused_logits = self.fused_head(torch.cat((ehr, self.projection(cxr)), 1))
        paired = (has_ehr & has_cxr)[:, None]
        logits = torch.where(paired, fused_logits, ehr_logits).float()
        terms = {
            "ehr": _bce(ehr_logits, batch.targets, batch, ("ehr",)),
            "cxr": _bce(radiology, _radiology_targets(batch), batch, ("cxr",)),
            "fused": _bce(fused_logits, batch.targets, batch, ("ehr", "cxr")),
        }
        return Output(logits, {"ehr": ehr, "cxr": cxr}, terms)


def _bce(logits: Tensor, targets: Tensor, batch: Batch, over: tuple[str, ...]) -> Term:
    return term(bce_by_class(logits, targets).mean(1), batch, over)


def _radiology_targets(batch: Batch) -> Tensor:
    """[B, 14], zeros in rows without an image."""
    targets = batch.cxr_targets
    return targets.new_zeros(len(batch), targets.shape[1]).index_copy(0, batch.cxr_index, targets)
