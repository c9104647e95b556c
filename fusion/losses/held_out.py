"""How much two representations share, told by critics that are trained afterwards.

A bound that was minimised in training says little of what it bounded: the critic may have been
poor, or fooled. Here fresh ones are trained on half of some held-out rows, stopped by a fifth of
that half, and measured on the other half: vCLUB (Cheng et al. 2020), above the mutual information
where its Gaussian fits, and InfoNCE (van den Oord et al. 2018, Eq 4), below it and below log 64.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion.losses.vclub import ConditionalGaussian, log_likelihood, vclub_by_row

if TYPE_CHECKING:
    from collections.abc import Callable

EPOCHS, PATIENCE, BATCH, RATE, DECAY = 100, 8, 64, 3e-3, 1e-2


def information(x: Tensor, y: Tensor, *, hidden: int = 64, seed: int = 0) -> dict[str, float]:
    """Measure x and y by vCLUB and InfoNCE, in nats, with fresh critics, on half of the rows.

    Each column is standardised by the half that is trained on; a constant one becomes zero.

    Args:
        x: [N, X], N at least 20.
        y: [N, Y].
        hidden: Width of the critics' hidden layers.
        seed: Draws the halves and the critics.

    Raises:
        ValueError: Fewer than 20 rows.
    """
    if len(x) < 20:
        raise ValueError(f"{len(x)} rows are too few to train a critic and to measure with it")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = torch.randperm(len(x))
        used, held = order[: len(x) // 2], order[len(x) // 2 :]
        x, y = (_standardised(value.float(), used) for value in (x, y))
        kept, stopping = used[len(used) // 5 :], used[: len(used) // 5]
        gaussian = ConditionalGaussian(inputs=x.shape[1], outputs=y.shape[1], hidden=hidden)
        _fit(gaussian, lambda rows: _surprise(gaussian, x[rows], y[rows]), kept, stopping)
        pair = _Pair(x.shape[1], y.shape[1], hidden)
        _fit(pair, lambda rows: -info_nce(pair(x[rows], y[rows])), kept, stopping)
    with torch.no_grad():
        everything = torch.ones(len(held), dtype=torch.bool)
        mean, log_variance = gaussian(x[held])
        bound = vclub_by_row(mean, log_variance, y[held], everything).mean()
        size = min(BATCH, len(held))
        whole = held[: len(held) // size * size].reshape(-1, size)
        below = [info_nce(pair(x[rows], y[rows])) for rows in whole]
    return {"vclub": float(bound), "info_nce": float(torch.stack(below).mean())}


def info_nce(scores: Tensor) -> Tensor:
    """InfoNCE: log N + mean_i log softmax_j(scores)_ii of [N, N] scores of x_i with y_j."""
    own = F.log_softmax(scores, dim=1).diagonal().mean()
    return own + math.log(len(scores))


class _Pair(nn.Module):
    """Scores of each x with each y: the product of two networks of two layers."""

    def __init__(self, inputs: int, outputs: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
            for size in (inputs, outputs)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first, second = self.first(x), self.second(y)
        scores: Tensor = first @ second.T / first.shape[1] ** 0.5
        return scores


def _surprise(critic: ConditionalGaussian, x: Tensor, y: Tensor) -> Tensor:
    mean, log_variance = critic(x)
    return -log_likelihood(mean, log_variance, y).mean()


def _standardised(value: Tensor, rows: Tensor) -> Tensor:
    spread, mean = torch.std_mean(value[rows], dim=0)
    return torch.where(spread > 1e-6, (value - mean) / spread.clamp(min=1e-6), 0.0)


def _fit(critic: nn.Module, loss: Callable[[Tensor], Tensor], kept: Tensor, held: Tensor) -> None:
    """Adam on `kept`, stopped and put back to where the loss on `held` was lowest."""
    optimizer = torch.optim.AdamW(critic.parameters(), lr=RATE, weight_decay=DECAY)
    lowest, best, since = math.inf, copy.deepcopy(critic.state_dict()), 0
    for _ in range(EPOCHS):
        for rows in torch.split(kept[torch.randperm(len(kept))], BATCH):
            optimizer.zero_grad()
            torch.autograd.backward(loss(rows))
            optimizer.step()
        with torch.no_grad():
            now = float(loss(held))
        if now < lowest:
            lowest, best, since = now, copy.deepcopy(critic.state_dict()), 0
        elif (since := since + 1) >= PATIENCE:
            break
    critic.load_state_dict(best)
