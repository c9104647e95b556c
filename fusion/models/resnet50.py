"""The uni-modal ResNet-50 of DrFuse's comparison (Yao et al. 2024, Table 3): X-ray only."""

from __future__ import annotations

from typing import Literal

from fusion.encoders.image import Depth, ImageOptions
from fusion.image_classifier import ImageClassifier
from fusion.model import FusionModel


class ResNet50(ImageClassifier, name="resnet50"):
    """X-ray only."""

    class Config(ImageOptions, FusionModel.Config):
        """The paper's depth; smaller ones are for small images."""

        name: Literal["resnet50"] = "resnet50"
        depth: Depth = 50
        """Layers of the residual network."""
