"""MedFuse (Hayat, Geras, Shamout 2022, section 3): an LSTM over the modalities at hand.

RI and PT are the same model: PT starts `ehr_encoder` and `cxr_encoder` from the runs of stage 1
(`lstm` on the task, `resnet34` on the radiology labels) and trains everything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import nn

from fusion.encoders.image import ImageOptions, MissingImageOptions, build_resnet
from fusion.encoders.time_series import LSTMEncoder, LSTMOptions
from fusion.layers.present import keep_present, present_images, present_series
from fusion.layers.sequence_fusion import SequenceFusion
from fusion.model import FusionModel, Output

if TYPE_CHECKING:
    from data.schema import Batch
    from data.tasks import TaskSpec


class MedFuse(FusionModel, name="medfuse"):
    """g_fusion(f_fusion([f_ehr(x), phi(f_cxr(z))])), trained on the task's loss alone.

    Submodules: ehr_encoder, cxr_encoder, projection (phi), fusion, head. A row without an image
    has a sequence of length 1; so has a row without a series (the paper has none).
    """

    modalities = ("ehr", "cxr")
    image_encoder = "cxr_encoder"
    TINY: ClassVar = {"hidden": 8, "fusion_hidden": 12, "depth": 10, "base_width": 4}

    class Config(LSTMOptions, ImageOptions, MissingImageOptions, FusionModel.Config):
        """The paper's numbers."""

        name: Literal["medfuse"] = "medfuse"
        fusion_hidden: int = Field(default=512, ge=1)
        """Width of the fusion LSTM."""

    def __init__(self, config: Config, task: TaskSpec) -> None:
        super().__init__(config, task)
        self.missing_image = config.missing_image
        self.ehr_encoder = LSTMEncoder(hidden=config.hidden, dropout=config.dropout)
        self.cxr_encoder = build_resnet(config.depth, config.base_width, config.image_weights)
        self.projection = nn.Linear(self.cxr_encoder.channels, config.hidden)
        self.fusion = SequenceFusion(inputs=config.hidden, hidden=config.fusion_hidden)
        self.head = nn.Linear(config.fusion_hidden, len(task.labels))

    def forward(self, batch: Batch) -> Output:
        """One pass over a batch."""
        has_ehr, has_cxr = batch.present["ehr"], batch.present["cxr"]
        ehr = keep_present(self.ehr_encoder(*present_series(batch)), has_ehr)
        with present_images(batch, self.cxr_encoder, self.missing_image) as images:
            cxr = images.scatter(self.projection(self.cxr_encoder(images.values)))
        cxr = keep_present(cxr, has_cxr)
        fused = self.fusion(ehr, cxr, has_ehr, has_cxr)
        return Output(self.head(fused).float(), {"ehr": ehr, "cxr": cxr, "fused": fused})
