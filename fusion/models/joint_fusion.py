"""Joint fusion, a baseline of MedFuse (Hayat et al. 2022, section 4.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from fusion.encoders.image import ImageOptions, MissingImageOptions, build_resnet
from fusion.encoders.time_series import LSTMEncoder, LSTMOptions
from fusion.layers.concat_fusion import ConcatFusion
from fusion.layers.present import keep_present, present_images, present_series
from fusion.model import FusionModel, Output

if TYPE_CHECKING:
    from data.schema import Batch
    from data.tasks import TaskSpec


class JointFusion(FusionModel, name="joint_fusion"):
    """Early fusion's graph from random encoders, everything trained end to end.

    Submodules: ehr_encoder, cxr_encoder, fusion (projection, missing, head).
    """

    modalities = ("ehr", "cxr")
    image_encoder = "cxr_encoder"
    TINY: ClassVar = {"hidden": 8, "depth": 10, "base_width": 4}

    class Config(LSTMOptions, ImageOptions, MissingImageOptions, FusionModel.Config):
        """The paper's numbers."""

        name: Literal["joint_fusion"] = "joint_fusion"
        missing: Literal["learned", "zeros"] = "learned"
        """What stands for phi(v_cxr) in a row without an image (Table A2)."""

    def __init__(self, config: Config, task: TaskSpec) -> None:
        super().__init__(config, task)
        self.missing_image = config.missing_image
        self.ehr_encoder = LSTMEncoder(hidden=config.hidden, dropout=config.dropout)
        self.cxr_encoder = build_resnet(config.depth, config.base_width, config.image_weights)
        self.fusion = ConcatFusion(
            series=config.hidden,
            visual=self.cxr_encoder.channels,
            classes=len(task.labels),
            missing=config.missing,
        )

    def forward(self, batch: Batch) -> Output:
        """One pass over a batch."""
        has_cxr = batch.present["cxr"]
        ehr = keep_present(self.ehr_encoder(*present_series(batch)), batch.present["ehr"])
        with present_images(batch, self.cxr_encoder, self.missing_image) as images:
            cxr = images.scatter(self.fusion.projection(self.cxr_encoder(images.values)))
        cxr = keep_present(cxr, has_cxr)
        logits = self.fusion(ehr, cxr, has_cxr).float()
        return Output(logits, {"ehr": ehr, "cxr": cxr})
