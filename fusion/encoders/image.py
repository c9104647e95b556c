"""Encoders of the X-ray: residual networks of any of four depths, whole or in two branches."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from data.config import Config
from fusion.layers.present import MissingImage
from fusion.weights import load_image_weights

Depth = Literal[10, 18, 34, 50]

_BLOCKS: dict[int, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


class ImageOptions(Config):
    """The numbers of an image encoder."""

    depth: Depth = 34
    """Layers of the residual network; MedFuse's is 34, DrFuse's 50."""
    base_width: int = Field(default=64, ge=1)
    """Channels of the stem; the four stages have 1, 2, 4 and 8 times as many (50: 4 times that)."""
    image_weights: Path | None = None
    """File of torchvision's ImageNet weights for this depth (.safetensors or .pth); else random."""


class MissingImageOptions(Config):
    """What happens to rows without an image in MedFuse's code and in its comparisons."""

    missing_image: MissingImage = "not_encoded"
    """`zero_image` encodes a zero image, as the released code does: it then takes part in batch
    norm. What it gives is dropped by MedFuse, early and joint fusion, and used by MMTM and DAFT."""


class ResNet(nn.Module):
    """A residual network up to one of its stages, averaged over the image (He et al. 2016).

    Names, blocks and initialisation are torchvision's, so that its weights load; `base_width` and
    depth 10 are for small images. At the defaults the trunk has 21.28 M parameters.
    """

    def __init__(self, *, depth: Depth = 34, base_width: int = 64, stages: int = 4) -> None:
        super().__init__()
        block, counts = _BLOCKS[depth]
        self.stages = stages
        self.conv1 = nn.Conv2d(3, base_width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(base_width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = base_width
        for stage, count in enumerate(counts[:stages]):
            width = base_width * 2**stage
            layer = _stage(block, channels, width, count, stride=1 if stage == 0 else 2)
            self.add_module(f"layer{stage + 1}", layer)
            channels = width * block.expansion
        self.channels = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """[P, 3, S, S] to the [P, channels] mean over the last stage's map."""
        return self.run_stages(self.stem(images), 1, self.stages).mean((2, 3))

    def stem(self, images: Tensor) -> Tensor:
        """[P, 3, S, S] to the [P, base_width, S/4, S/4] map before the first stage."""
        return self.maxpool(self.relu(self.bn1(self.conv1(images))))

    def run_stages(self, maps: Tensor, first: int, last: int) -> Tensor:
        """Apply stages `first` to `last` (counted from 1, inclusive; none if last < first)."""
        for stage in range(first, last + 1):
            maps = self.get_submodule(f"layer{stage}")(maps)
        return maps


def stage_channels(depth: Depth, base_width: int, stage: int) -> int:
    """Channels of the map after a stage (counted from 1)."""
    return int(base_width * 2 ** (stage - 1) * _BLOCKS[depth][0].expansion)


class TwinResNet(nn.Module):
    """DrFuse's two image encoders, shared and distinct, each projected to the common width.

    `per_branch`: two whole networks, as the paper has it. `shared`: one convolution and batch norm
    before both, as in the released code, which as published does not run: the ReLU and max pool
    after them and the average pool at the end are missing there, and present here.
    """

    def __init__(
        self,
        *,
        depth: Depth = 50,
        base_width: int = 64,
        width: int = 256,
        stem: Literal["per_branch", "shared"] = "per_branch",
        image_weights: Path | None = None,
    ) -> None:
        super().__init__()
        self.shared = build_resnet(depth, base_width, image_weights)
        self.distinct = build_resnet(depth, base_width, image_weights)
        self.one_stem = stem == "shared"
        if self.one_stem:
            del self.distinct.conv1, self.distinct.bn1
        self.shared_projection = nn.Linear(self.shared.channels, width)
        self.distinct_projection = nn.Linear(self.distinct.channels, width)

    def forward(self, images: Tensor) -> Tensor:
        """[P, 3, S, S] to [P, 2, D]: the shared and the distinct representation."""
        first = self.shared.stem(images)
        second = first if self.one_stem else self.distinct.stem(images)
        shared = self.shared.run_stages(first, 1, 4).mean((2, 3))
        distinct = self.distinct.run_stages(second, 1, 4).mean((2, 3))
        return torch.stack((self.shared_projection(shared), self.distinct_projection(distinct)), 1)


def build_resnet(
    depth: Depth, base_width: int, image_weights: Path | None = None, *, stages: int = 4
) -> ResNet:
    """A network, random or from a file of ImageNet weights.

    Raises:
        InputError: The file is missing, unreadable, or made for another network.
    """
    network = ResNet(depth=depth, base_width=base_width, stages=stages)
    if image_weights is not None:
        load_image_weights(network, image_weights)
    return network


def _stage(
    block: type[BasicBlock | Bottleneck], channels: int, width: int, count: int, *, stride: int
) -> nn.Sequential:
    outputs = width * block.expansion
    downsample = None
    if stride != 1 or channels != outputs:
        downsample = nn.Sequential(
            nn.Conv2d(channels, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
        )
    blocks = [block(channels, width, stride, downsample)]
    blocks += [block(outputs, width) for _ in range(count - 1)]
    return nn.Sequential(*blocks)
