"""DAFT as MedFuse's comparison uses it (Hayat et al. 2022, section 4.3): X-ray shapes the series.

Poelsterl et al. (2021) modulate image features by tabular data; here the image modulates the
series between the two LSTMs, and only the series' head predicts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from fusion.encoders.image import ImageOptions, MissingImageOptions, build_resnet
from fusion.encoders.time_series import LSTMEncoder, LSTMOptions
from fusion.layers.daft import AffineTransform
from fusion.layers.pooling import masked_mean
from fusion.layers.present import keep_present, present_images, present_series
from fusion.model import FusionModel, Output

if TYPE_CHECKING:
    from data.schema import Batch
    from data.tasks import TaskSpec


class DAFT(FusionModel, name="daft"):
    """LSTM-1 -> scale and shift of each channel -> LSTM-2 -> dropout -> linear.

    The mean of LSTM-1's states is over a row's own steps (the released code counts the padding). A
    row without an image, which the paper does not train on, has zeros for the pooled map; with
    `missing_image: zero_image` (DrFuse's comparison) it has what a zero image gives.

    Submodules: ehr_encoder, cxr_encoder (up to `stage`), daft, ehr_head.
    """

    modalities = ("ehr", "cxr")
    image_encoder = "cxr_encoder"
    TINY: ClassVar = {"hidden": 8, "depth": 10, "base_width": 4}

    class Config(LSTMOptions, ImageOptions, MissingImageOptions, FusionModel.Config):
        """The paper's numbers."""

        name: Literal["daft"] = "daft"
        stage: Literal[1, 2, 3, 4] = 3
        """ResNet stage whose map is pooled; best: 3 for phenotyping, 4 for mortality."""

    def __init__(self, config: Config, task: TaskSpec) -> None:
        super().__init__(config, task)
        self.missing_image = config.missing_image
        self.ehr_encoder = LSTMEncoder(hidden=config.hidden, dropout=config.dropout)
        self.cxr_encoder = build_resnet(
            config.depth, config.base_width, config.image_weights, stages=config.stage
        )
        self.daft = AffineTransform(visual=self.cxr_encoder.channels, series=config.hidden)
        self.ehr_head = nn.Linear(config.hidden, len(task.labels))

    def forward(self, batch: Batch) -> Output:
        """One pass over a batch."""
        series, lengths = present_series(batch)
        sequence = self.ehr_encoder.lower(series, lengths)
        with present_images(batch, self.cxr_encoder, self.missing_image) as images:
            visual = images.scatter(self.cxr_encoder(images.values))
        scale, shift = self.daft(visual, masked_mean(sequence, lengths))
        transformed = scale[:, None] * sequence + shift[:, None]
        ehr = keep_present(self.ehr_encoder.upper(transformed, lengths), batch.present["ehr"])
        return Output(self.ehr_head(ehr).float(), {"ehr": ehr, "cxr": visual})
