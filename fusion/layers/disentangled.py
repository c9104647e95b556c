"""The disentangled transformer of MEDFuse (Phan et al. 2024, section 3.3).

The paper's shapes are short of a model: C = A (x) B in R^(m x a x b) with m, a and b unexplained.
Were m the batch, attention would mix patients; the Kronecker product of two whole vectors is 262
thousand wide; one token a modality makes every softmax 1; and K_c + K_a + K_b wants as many tokens
of one width on each side. The reading here: each vector becomes m tokens, C_t is the outer product
of the t-th tokens, and all three are brought to one width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DisentangledTransformer(nn.Module):
    """Two vectors to what each has of its own and what they have in common.

    A -> LayerNorm -> Linear -> m tokens A_t, B likewise. Z_a, Z_b = Linear(A_t), Linear(B_t) and
    Z_c = Linear(A_t (x) B_t), each under a LayerNorm and with learned positions. Layers follow
    (`DisentangledLayer`), and the mean over tokens.
    """

    def __init__(
        self,
        *,
        inputs: tuple[int, int],
        tokens: int = 16,
        token_width: int = 64,
        width: int = 256,
        heads: int = 8,
        layers: int = 1,
        dropout: float = 0.1,
        append_one: bool = False,
    ) -> None:
        """Build for vectors of these widths.

        Args:
            inputs: Widths of A and of B.
            tokens: m.
            token_width: Of A_t and of B_t.
            width: Of every token from then on (D).
            heads: They divide `width`.
            layers: Of the three streams.
            dropout: In attention, and after it and each network.
            append_one: Keep A_t and B_t themselves beside their products.
        """
        super().__init__()
        self.shape = (tokens, token_width)
        self.append_one = append_one
        self.tokens = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(size), nn.Linear(size, tokens * token_width))
            for size in inputs
        )
        joint = (token_width + append_one) ** 2
        self.streams = nn.ModuleList(
            nn.Sequential(nn.Linear(size, width), nn.LayerNorm(width))
            for size in (token_width, token_width, joint)
        )
        self.positions = nn.Parameter(torch.empty(3, tokens, width).uniform_(-0.1, 0.1))
        self.layers = nn.ModuleList(
            DisentangledLayer(width=width, heads=heads, dropout=dropout) for _ in range(layers)
        )

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, A] and [B, L] to s_a, s_b and s_c, [B, D] each."""
        a, b = (
            tokens(vector).unflatten(1, self.shape)
            for tokens, vector in zip(self.tokens, (first, second), strict=True)
        )
        given = (a, b, outer_product(a, b, self.append_one).flatten(2))
        states = [
            stream(inputs) + position
            for stream, inputs, position in zip(self.streams, given, self.positions, strict=True)
        ]
        for layer in self.layers:
            states = layer(*states)
        s_a, s_b, s_c = (state.mean(1) for state in states)
        return s_a, s_b, s_c


class DisentangledLayer(nn.Module):
    """Self-attention of a and of b; c attends with their keys and values added to its own.

    S_c = Z_c + softmax(Q_c (K_c + K_a + K_b)^T / sqrt(d_h)) (V_c + V_a + V_b), where K_a, V_a are
    those of a's self-attention. Pre-norm, and a network of width 4d after each attention.
    """

    def __init__(self, *, width: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.projections = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * width)) for _ in range(3)
        )
        self.outputs = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout)) for _ in range(3)
        )
        self.feedforward = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(4 * width, width),
                nn.Dropout(dropout),
            )
            for _ in range(3)
        )

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three times [B, m, D] to the same."""
        states = (a, b, c)
        projected = [
            projection(state).chunk(3, -1)
            for projection, state in zip(self.projections, states, strict=True)
        ]
        (_, key_a, value_a), (_, key_b, value_b), (query, key, value) = projected
        projected[2] = (query, key + key_a + key_b, value + value_a + value_b)
        attended = [
            state + output(self._attend(*qkv))
            for state, output, qkv in zip(states, self.outputs, projected, strict=True)
        ]
        a, b, c = (
            state + feedforward(state)
            for state, feedforward in zip(attended, self.feedforward, strict=True)
        )
        return a, b, c

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, m, D] each, in heads."""
        split = (len(query), query.shape[1], self.heads, -1)
        q, k, v = (x.reshape(split).transpose(1, 2) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)


def outer_product(a: Tensor, b: Tensor, append_one: bool = False) -> Tensor:
    """A_t (x) B_t of each token: [B, m, E] and [B, m, F] to [B, m, E, F].

    With `append_one` both get a last entry of 1, so that the product [B, m, E + 1, F + 1] holds
    A_t and B_t themselves in its last column and row (Chen et al. 2020).
    """
    if append_one:
        a, b = (torch.cat((x, torch.ones_like(x[..., :1])), -1) for x in (a, b))
    return a[..., :, None] * b[..., None, :]
