"""MedFuse-II (Yao et al. 2024, section 4.2): MedFuse with DrFuse's kinds of encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import nn

from fusion.encoders.image import Depth, ImageOptions, MissingImageOptions, build_resnet
from fusion.encoders.time_series import TransformerEncoder, TransformerOptions
from fusion.layers.present import keep_present, present_images, present_series
from fusion.layers.sequence_fusion import SequenceFusion
from fusion.model import FusionModel, Output

if TYPE_CHECKING:
    from data.schema import Batch
    from data.tasks import TaskSpec


class MedFuse2(FusionModel, name="medfuse2"):
    """A Transformer and a ResNet-50, projected 2048 -> 256, under MedFuse's LSTM fusion.

    Submodules: ehr_encoder, cxr_encoder, projection, fusion, head.
    """

    modalities = ("ehr", "cxr")
    image_encoder = "cxr_encoder"
    TINY: ClassVar = {
        "hidden": 8,
        "heads": 2,
        "feedforward": 16,
        "fusion_hidden": 12,
        "depth": 10,
        "base_width": 4,
    }

    class Config(TransformerOptions, ImageOptions, MissingImageOptions, FusionModel.Config):
        """The paper's numbers."""

        name: Literal["medfuse2"] = "medfuse2"
        depth: Depth = 50
        """Layers of the residual network; smaller ones are for small images."""
        fusion_hidden: int = Field(default=512, ge=1)
        """Width of the fusion LSTM."""

    def __init__(self, config: Config, task: TaskSpec) -> None:
        super().__init__(config, task)
        self.missing_image = config.missing_image
        self.ehr_encoder = TransformerEncoder(
            **config.model_dump(include=set(TransformerOptions.model_fields))
        )
        self.cxr_encoder = build_resnet(config.depth, config.base_width, config.image_weights)
        self.projection = nn.Linear(self.cxr_encoder.channels, config.hidden)
        self.fusion = SequenceFusion(inputs=config.hidden, hidden=config.fusion_hidden)
        self.head = nn.Linear(config.fusion_hidden, len(task.labels))

    def forward(self, batch: Batch) -> Output:
        """One pass over a batch."""
        has_ehr, has_cxr = batch.present["ehr"], batch.present["cxr"]
        ehr = keep_present(self.ehr_encoder(*present_series(batch))[:, 0], has_ehr)
        with present_images(batch, self.cxr_encoder, self.missing_image) as images:
            cxr = images.scatter(self.projection(self.cxr_encoder(images.values)))
        cxr = keep_present(cxr, has_cxr)
        fused = self.fusion(ehr, cxr, has_ehr, has_cxr)
        return Output(self.head(fused).float(), {"ehr": ehr, "cxr": cxr, "fused": fused})
