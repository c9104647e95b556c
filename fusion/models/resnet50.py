"""The uni-modal ResNet-50 of DrFuse's comparison (Yao et al. 2024, Table 3): X-ray only."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from fusion.encoders.image import Depth, ImageOptions, build_resnet
from fusion.layers.present import present_images
from fusion.model import FusionModel, Output

if TYPE_CHECKING:
    from data.schema import Batch
    from data.tasks import TaskSpec


class ResNet50(FusionModel, name="resnet50"):
    """A linear head on the averaged last map; on stays, or on images for the radiology labels.

    A row without an image gets the head's bias.
    """

    modalities = ("cxr",)
    image_encoder = "cxr_encoder"
    TINY: ClassVar = {"depth": 10, "base_width": 4}

    class Config(ImageOptions, FusionModel.Config):
        """The paper's numbers; a smaller depth and width are for small images."""

        name: Literal["resnet50"] = "resnet50"
        depth: Depth = 50
        """Layers of the residual network; smaller ones are for small images."""

    def __init__(self, config: Config, task: TaskSpec) -> None:
        super().__init__(config, task)
        self.cxr_encoder = build_resnet(config.depth, config.base_width, config.image_weights)
        self.cxr_head = nn.Linear(self.cxr_encoder.channels, len(task.labels))

    def forward(self, batch: Batch) -> Output:
        """One pass over a batch."""
        with present_images(batch, self.cxr_encoder) as images:
            encoded = images.scatter(self.cxr_encoder(images.values))
        return Output(self.cxr_head(encoded).float(), {"cxr": encoded})
