"""Early fusion, a baseline of MedFuse (Hayat et al. 2022, section 4.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from fusion.encoders.image import ImageOptions, build_resnet
from fusion.encoders.time_series import LSTMEncoder, LSTMOptions
from fusion.layers.concat_fusion import ConcatFusion
from fusion.layers.present import keep_present, present_images, present_series
from fusion.model import FusionModel, Output

if TYPE_CHECKING:
    from data.schema import Batch
    from data.tasks import TaskSpec


class EarlyFusion(FusionModel, name="early_fusion"):
    """A linear classifier on [v_ehr, phi(v_cxr)] of frozen, pre-trained encoders.

    The encoders come from runs of `lstm` and `resnet34` on the task (`init_from`), get no
    gradient and stay in evaluation mode, so that neither dropout nor batch norm moves them; the
    released code leaves both in training mode. So a zero image for a missing one could change
    nothing: there is no such switch.

    Submodules: ehr_encoder, cxr_encoder, fusion (projection, missing, head).
    """

    modalities = ("ehr", "cxr")
    image_encoder = "cxr_encoder"
    pretrained = ("ehr_encoder", "cxr_encoder")
    TINY: ClassVar = {"hidden": 8, "depth": 10, "base_width": 4}

    class Config(LSTMOptions, ImageOptions, FusionModel.Config):
        """The paper's numbers."""

        name: Literal["early_fusion"] = "early_fusion"
        missing: Literal["learned", "zeros"] = "learned"
        """What stands for phi(v_cxr) in a row without an image (Table A2)."""

    def __init__(self, config: Config, task: TaskSpec) -> None:
        super().__init__(config, task)
        self.ehr_encoder = LSTMEncoder(hidden=config.hidden, dropout=config.dropout)
        self.cxr_encoder = build_resnet(config.depth, config.base_width, config.image_weights)
        self.fusion = ConcatFusion(
            series=config.hidden,
            visual=self.cxr_encoder.channels,
            classes=len(task.labels),
            missing=config.missing,
        )
        self.ehr_encoder.requires_grad_(False)
        self.cxr_encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Training mode for all but the frozen encoders."""
        super().train(mode)
        self.ehr_encoder.eval()
        self.cxr_encoder.eval()
        return self

    def forward(self, batch: Batch) -> Output:
        """One pass over a batch."""
        has_cxr = batch.present["cxr"]
        ehr = keep_present(self.ehr_encoder(*present_series(batch)), batch.present["ehr"])
        with present_images(batch, self.cxr_encoder) as images:
            cxr = images.scatter(self.fusion.projection(self.cxr_encoder(images.values)))
        cxr = keep_present(cxr, has_cxr)
        logits = self.fusion(ehr, cxr, has_cxr).float()
        return Output(logits, {"ehr": ehr, "cxr": cxr})
