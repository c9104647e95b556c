"""MMTM as MedFuse's comparison uses it (Hayat et al. 2022, section 4.3; Joze et al. 2020).

Three updates a step, each with its own forward pass and optimizer: the series' loss, the image's
loss, the joint loss. In the released code both uni-modal optimizers hold the image encoder, so
that the series' branch learns through the joint step only; here each holds its own branch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from fusion.encoders.image import (
    ImageOptions,
    MissingImageOptions,
    build_resnet,
    stage_channels,
)
from fusion.encoders.time_series import LSTMEncoder, LSTMOptions
from fusion.layers.mmtm import TransferModule
from fusion.layers.pooling import logit_pool, masked_mean
from fusion.layers.present import keep_present, present_images, present_series
from fusion.losses.rows import bce_by_class, term
from fusion.model import FusionModel, Output, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from data.schema import Batch
    from data.tasks import TaskSpec


class MMTM(FusionModel, name="mmtm"):
    """Gates on the map after a ResNet stage and on LSTM-1's states, and three heads.

    The mean over time is over a row's own steps (the released code counts the padding). A row
    without an image, which the paper does not train on, has zeros for the pooled map and for v_cxr
    and is late-averaged from the series alone; with `missing_image: zero_image` (DrFuse's
    comparison) it has what a zero image gives.

    Submodules: ehr_encoder, cxr_encoder, mmtm, ehr_head, cxr_head, joint_projection, joint_head.
    """

    modalities = ("ehr", "cxr")
    phases = (
        Phase(
            "ehr",
            parameters=("ehr_encoder", "mmtm.squeeze", "mmtm.series_gate", "ehr_head"),
            terms=("ehr",),
        ),
        Phase(
            "cxr",
            parameters=("cxr_encoder", "mmtm.squeeze", "mmtm.visual_gate", "cxr_head"),
            terms=("cxr",),
        ),
        Phase(
            "joint",
            parameters=("ehr_encoder", "cxr_encoder", "mmtm", "joint_projection", "joint_head"),
            terms=("joint",),
        ),
    )
    TINY: ClassVar = {"hidden": 8, "depth": 10, "base_width": 4}

    class Config(LSTMOptions, ImageOptions, MissingImageOptions, FusionModel.Config):
        """The paper's numbers."""

        name: Literal["mmtm"] = "mmtm"
        stage: Literal[1, 2, 3, 4] = 4
        """ResNet stage after which the module sits; 4 was best for both tasks."""
        reported: Literal["late", "joint", "ehr", "cxr"] = "late"
        """The head whose logits are reported, to be chosen on validation. `late`: the mean of the
        two uni-modal probabilities, as in the original MMTM."""

    def __init__(self, config: Config, task: TaskSpec) -> None:
        super().__init__(config, task)
        self.missing_image, self.stage, self.reported = (
            config.missing_image,
            config.stage,
            config.reported,
        )
        classes = len(task.labels)
        self.ehr_encoder = LSTMEncoder(hidden=config.hidden, dropout=config.dropout)
        self.cxr_encoder = build_resnet(config.depth, config.base_width, config.image_weights)
        channels = self.cxr_encoder.channels
        self.mmtm = TransferModule(
            visual=stage_channels(config.depth, config.base_width, config.stage),
            series=config.hidden,
        )
        self.ehr_head = nn.Linear(config.hidden, classes)
        self.cxr_head = nn.Linear(channels, classes)
        self.joint_projection = nn.Linear(config.hidden, channels)
        self.joint_head = nn.Linear(2 * channels, classes)

    def forward(self, batch: Batch) -> Output:
        """One pass over a batch."""
        ehr, cxr, has_cxr = self._encode(batch)
        heads = {
            "ehr": self.ehr_head(ehr),
            "cxr": self.cxr_head(cxr),
            "joint": self.joint_head(torch.cat((self.joint_projection(ehr), cxr), 1)),
        }
        over: dict[str, tuple[str, ...]] = {"ehr": ("ehr",), "cxr": ("cxr",), "joint": ()}
        if self.missing_image == "zero_image":
            over["cxr"] = ()
        terms = {
            name: term(bce_by_class(logits, batch.targets).mean(1), batch, over[name])
            for name, logits in heads.items()
        }
        late = _late_average(heads["ehr"], heads["cxr"], batch.present["ehr"], has_cxr)
        logits = {**heads, "late": late}[self.reported].float()
        features = {"ehr": ehr, "cxr": cxr}
        return Output(logits, features | {f"{k}_logits": v for k, v in heads.items()}, terms)

    def _encode(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H] series, [B, V] image, and which rows have an encoded image ([B] bool)."""
        series, lengths = present_series(batch)
        sequence = self.ehr_encoder.lower(series, lengths)
        network = self.cxr_encoder
        with present_images(batch, network, self.missing_image) as images:
            maps = network.run_stages(network.stem(images.values), 1, self.stage)
            pooled = images.scatter(maps.mean((2, 3)))
            visual_gate, series_gate = self.mmtm(pooled, masked_mean(sequence, lengths))
            gated = maps * images.gather(visual_gate)[:, :, None, None]
            last = network.run_stages(gated, self.stage + 1, network.stages)
            cxr = images.scatter(last.mean((2, 3)))
        gated_sequence = sequence * series_gate[:, None]
        ehr = keep_present(self.ehr_encoder.upper(gated_sequence, lengths), batch.present["ehr"])
        return ehr, cxr, images.available


def _late_average(ehr: Tensor, cxr: Tensor, has_ehr: Tensor, has_cxr: Tensor) -> Tensor:
    """[B, C] logits of the mean probability; of the one modality where the other is missing."""
    alone = torch.where(has_cxr[:, None] & ~has_ehr[:, None], cxr, ehr)
    return torch.where((has_ehr & has_cxr)[:, None], logit_pool(ehr, cxr), alone)
