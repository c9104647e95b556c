"""Encoders of the hourly series: MedFuse's stacked LSTMs and DrFuse's Transformer."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from data.config import Config
from data.schema import N_FEATURES
from fusion.layers.pooling import masked_mean
from fusion.layers.present import valid_steps
from fusion.layers.recurrent import LSTM


class LSTMOptions(Config):
    """The numbers of MedFuse's series encoder (section 4.2)."""

    hidden: int = Field(default=256, ge=1)
    """Width of both LSTMs."""
    dropout: float = Field(default=0.3, ge=0, lt=1)
    """On the last hidden state; between the LSTMs there is none."""


class TransformerOptions(Config):
    """The numbers of DrFuse's series encoder (section 3.3; those left unsaid from its code)."""

    hidden: int = Field(default=256, ge=1)
    """Width of every representation (d)."""
    heads: int = Field(default=4, ge=1)
    """Attention heads of a layer."""
    feedforward: int = Field(default=2048, ge=1)
    """Width of the network after each attention."""
    layers: int = Field(default=1, ge=1)
    """Layers of each branch, after the one that the branches share."""
    dropout: float = Field(default=0.3, ge=0, lt=1)
    """Inside the layers."""
    max_length: int = Field(default=350, ge=1)
    """Learned positions; a longer series is cut to its first steps."""


class LSTMEncoder(nn.Module):
    """Two separate single-layer LSTMs; the last hidden state, after dropout (MedFuse, 3.1).

    868,352 parameters at 76 -> 256 -> 256. Initialisation: hidden weights orthogonal, input
    weights Xavier uniform, biases 0. (The dropout argument the released code gives to each
    single-layer LSTM does nothing in PyTorch, so none is applied between them.)
    """

    def __init__(
        self, *, hidden: int = 256, dropout: float = 0.3, inputs: int = N_FEATURES, layers: int = 2
    ) -> None:
        super().__init__()
        widths = [inputs] + [hidden] * (layers - 1)
        self.layers = nn.ModuleList(LSTM(width, hidden, batch_first=True) for width in widths)
        self.dropout = nn.Dropout(dropout)
        for name, parameter in self.layers.named_parameters():
            if "weight_hh" in name:
                nn.init.orthogonal_(parameter)
            elif "weight_ih" in name:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)

    def forward(self, series: Tensor, lengths: Tensor) -> Tensor:
        """[B, T, F] padded series and [B] lengths to [B, H]."""
        return self.upper(self.lower(series, lengths), lengths)

    def lower(self, series: Tensor, lengths: Tensor) -> Tensor:
        """[B, T, F] to the [B, T, H] states of all LSTMs but the last; zeros beyond lengths."""
        for layer in self.layers[:-1]:
            states, _ = layer(_pack(series, lengths))
            series, _ = pad_packed_sequence(states, batch_first=True, total_length=series.shape[1])
        return series

    def upper(self, sequence: Tensor, lengths: Tensor) -> Tensor:
        """[B, T, H] to the [B, H] last hidden state of the last LSTM, after dropout."""
        _, (hidden, _) = self.layers[-1](_pack(sequence, lengths))
        return self.dropout(hidden[-1])


def _pack(series: Tensor, lengths: Tensor) -> nn.utils.rnn.PackedSequence:
    return pack_padded_sequence(series, lengths.cpu(), batch_first=True, enforce_sorted=False)


class TransformerEncoder(nn.Module):
    """A Transformer whose branches share the embedding and the first layer (DrFuse, 3.3).

    Linear, plus learned positions U(-0.1, 0.1), then one common layer, then `branches` stacks of
    `layers` layers, each pooled by the mean over a row's own steps. The layers are PyTorch's
    defaults (post-norm, ReLU); there is no class token, scaling or dropout of the embedding.
    """

    def __init__(
        self,
        *,
        hidden: int = 256,
        heads: int = 4,
        feedforward: int = 2048,
        layers: int = 1,
        dropout: float = 0.3,
        max_length: int = 350,
        branches: int = 1,
    ) -> None:
        super().__init__()

        def layer() -> nn.TransformerEncoderLayer:
            return nn.TransformerEncoderLayer(hidden, heads, feedforward, dropout, batch_first=True)

        self.embedding = nn.Linear(N_FEATURES, hidden)
        self.positions = nn.Parameter(torch.empty(max_length, hidden).uniform_(-0.1, 0.1))
        self.common = layer()
        self.branches = nn.ModuleList(
            nn.ModuleList(layer() for _ in range(layers)) for _ in range(branches)
        )

    def forward(self, series: Tensor, lengths: Tensor) -> Tensor:
        """[B, T, F] padded series and [B] lengths to [B, branches, D]."""
        series = series[:, : len(self.positions)]
        lengths = lengths.clamp(max=len(self.positions))
        steps = series.shape[1]
        padding = ~valid_steps(lengths, steps)
        embedded = self.embedding(series) + self.positions[:steps]
        common = self.common(embedded, src_key_padding_mask=padding)
        pooled = []
        for branch in self.branches:
            states = common
            for layer in branch.children():
                states = layer(states, src_key_padding_mask=padding)
            pooled.append(masked_mean(states, lengths))
        return torch.stack(pooled, 1)
