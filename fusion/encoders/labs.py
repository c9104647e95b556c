"""The encoder of a row of lab results, one token an item: the tabular branch of MEDFuse (MLTM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from data.config import Config
from data.errors import InputError


class LabOptions(Config):
    """Choices: the paper (section 3.2.2) gives no number but the 75 % that are masked."""

    dim: int = Field(default=64, ge=2)
    """Width of a token (D)."""
    heads: int = Field(default=4, ge=1)
    """Attention heads of a layer; they divide `dim`."""
    encoder_depth: int = Field(default=8, ge=1)
    """Layers of the encoder."""
    mlp_ratio: int = Field(default=4, ge=1)
    """Width of the network after each attention, in multiples of `dim`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Inside the layers."""
    shared_wb: bool = False
    """One w and b of w * x + b for all items (ReMasker) instead of one pair an item."""
    positions: Literal["learned", "sincos"] = "learned"
    """What is added to a token by its item: learned, or fixed sines and cosines (ReMasker)."""
    pool: Literal["cls", "mean"] = "cls"
    """A row's vector: its class token, or the mean of its tokens, the class token among them."""

    @model_validator(mode="after")
    def _divided(self) -> LabOptions:
        if self.dim % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide dim ({self.dim})")
        if self.positions == "sincos" and self.dim % 2:
            raise ValueError(f"dim ({self.dim}) must be even for positions=sincos")
        return self


@dataclass(frozen=True)
class LabTokens:
    """What the encoder gives.

    Attributes:
        tokens: [B, K + 1, D], the class token first, then one token an item; zero where not real.
        mask: [B, K + 1] bool, True = real: the class token, and the items that were seen.
    """

    tokens: Tensor
    mask: Tensor


class LabEncoder(nn.Module):
    """w_j * x_j + b_j + position_j of each item seen, a class token, a pre-norm Transformer.

    Phan et al. 2024, section 3.2.2; layers as in a masked autoencoder of images, GELU, and a norm
    after the last. An item that is not seen is no key of any attention and its value is not read,
    so that neither its value nor its presence reaches a real token.
    """

    def __init__(self, options: LabOptions, items: int) -> None:
        """Encode rows of `items` columns (K).

        Raises:
            InputError: `items` is below 1.
        """
        super().__init__()
        if items < 1:
            raise InputError(f"a lab encoder needs at least one item, but got {items}")
        self.options = options
        self.items = items
        self.width = options.dim
        self.embedding = LabEmbedding(options, items)
        self.blocks = lab_blocks(options, options.encoder_depth)
        self.norm = nn.LayerNorm(options.dim)

    def forward(self, labs: Tensor, observed: Tensor) -> LabTokens:
        """Encode the values that may be seen.

        Args:
            labs: [B, K] float32, scaled to [0, 1]; anything, NaN too, where `observed` is False.
            observed: [B, K] bool, True = seen. A row without any is its class token alone.
        """
        states = self.embedding(torch.where(observed, labs, 0.0))
        mask = torch.cat((torch.ones_like(observed[:, :1]), observed), 1)
        for block in self.blocks:
            states = block(states, src_key_padding_mask=~mask)
        return LabTokens(torch.where(mask[:, :, None], self.norm(states), 0.0), mask)

    def pool(self, encoded: LabTokens) -> Tensor:
        """[B, D] a row's vector, as `pool` of the options says."""
        if self.options.pool == "cls":
            return encoded.tokens[:, 0]
        count = encoded.mask.sum(1, keepdim=True).to(encoded.tokens.dtype)
        return encoded.tokens.sum(1) / count


class LabEmbedding(nn.Module):
    """A token of each value, and the class token before them.

    It is a module of its own for sharded weights, which are gathered by the tensors that a module
    takes and gives.
    """

    def __init__(self, options: LabOptions, items: int) -> None:
        super().__init__()
        columns = 1 if options.shared_wb else items
        bound = options.dim**-0.5
        self.weight = nn.Parameter(torch.empty(columns, options.dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(columns, options.dim).uniform_(-bound, bound))
        self.cls = nn.Parameter(torch.empty(options.dim).uniform_(-0.1, 0.1))
        self.positions = LabPositions(options, items)

    def forward(self, labs: Tensor) -> Tensor:
        """[B, K] values to [B, K + 1, D]."""
        embedded = self.positions(labs[:, :, None] * self.weight + self.bias)
        first = self.cls.expand(len(labs), 1, -1).to(embedded.dtype)
        return torch.cat((first, embedded), 1)


class LabPositions(nn.Module):
    """What tells one item's token from another's."""

    def __init__(self, options: LabOptions, items: int) -> None:
        super().__init__()
        if options.positions == "learned":
            self.table = nn.Parameter(torch.empty(items, options.dim).uniform_(-0.1, 0.1))
        else:
            self.register_buffer("table", sines(items, options.dim), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, K, D] plus the positions of K items."""
        return tokens + self.table


def lab_blocks(options: LabOptions, depth: int) -> nn.ModuleList:
    """Pre-norm Transformer layers of the options' numbers."""
    return nn.ModuleList(
        nn.TransformerEncoderLayer(
            options.dim,
            options.heads,
            options.mlp_ratio * options.dim,
            options.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        for _ in range(depth)
    )


def sines(count: int, dim: int) -> Tensor:
    """[count, dim] sines, then cosines, of position / 10000^(2i / dim) (Vaswani et al. 2017)."""
    rates = 10_000.0 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.arange(1, count + 1)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), 1)
