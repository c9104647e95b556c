"""The uni-modal ResNet-34 of MedFuse (Hayat et al. 2022, section 3.1): stage 1, and a baseline."""

from __future__ import annotations

from typing import Literal

from fusion.encoders.image import Depth, ImageOptions
from fusion.image_classifier import ImageClassifier
from fusion.model import FusionModel


class ResNet34(ImageClassifier, name="resnet34"):
    """g_cxr(f_cxr(x)); on the 14 radiology labels it pre-trains the encoder."""

    class Config(ImageOptions, FusionModel.Config):
        """The paper's depth; smaller ones are for small images."""

        name: Literal["resnet34"] = "resnet34"
        depth: Depth = 34
        """Layers of the residual network."""
