"""The uni-modal residual network of both image papers; they differ in depth only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from fusion.encoders.image import build_resnet
from fusion.layers.present import present_images
from fusion.model import FusionModel, Output

if TYPE_CHECKING:
    from data.schema import Batch
    from data.tasks import TaskSpec


class ImageClassifier(FusionModel):
    """A linear head on a residual network's averaged last map.

    On stays for the task's labels, or on images for the 14 radiology labels. A row without an
    image gets the head's bias.
    """

    modalities = ("cxr",)
    image_encoder = "cxr_encoder"
    TINY: ClassVar = {"depth": 10, "base_width": 4}

    def __init__(self, config: Any, task: TaskSpec) -> None:
        super().__init__(config, task)
        self.cxr_encoder = build_resnet(config.depth, config.base_width, config.image_weights)
        self.cxr_head = nn.Linear(self.cxr_encoder.channels, len(task.labels))

    def forward(self, batch: Batch) -> Output:
        """One pass over a batch."""
        with present_images(batch, self.cxr_encoder) as images:
            encoded = images.scatter(self.cxr_encoder(images.values))
        return Output(self.cxr_head(encoded).float(), {"cxr": encoded})
