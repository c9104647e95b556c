"""Mutual information from above: vCLUB (Cheng et al. 2020; MEDFuse, Phan et al. 2024, Eq 1).

For x and y with a conditional q_theta(y | x) it is 1/N^2 sum_i sum_j [log q(y_i | x_i) -
log q(y_j | x_i)], an upper bound of I(x; y) as long as q is close to the true conditional, and of
any sign where it is not. For a diagonal Gaussian log q(y_j | x_i) is quadratic in y_j, so that the
mean over j needs the first two moments of y only: N rows take O(N), and the moments may be those of
the rows of all workers.

The printed loss of MEDFuse adds the mean log-likelihood of q to vCLUB and minimises the sum, which
makes q worse; theta has to maximise that likelihood, and vCLUB has to be minimised with theta held.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion.collective import sum_over_workers


class ConditionalGaussian(nn.Module):
    """q_theta(y | x) = N(mean(x), diag exp(log_variance(x))), two networks of two layers.

    The log-variance ends in a tanh, as in the public code of CLUB: variances lie in [1/e, e], so y
    has to be on a scale of about one.
    """

    def __init__(self, *, inputs: int = 512, outputs: int = 256, hidden: int = 256) -> None:
        super().__init__()
        self.mean = _TwoLayers(inputs, hidden, outputs)
        self.log_variance = _TwoLayers(inputs, hidden, outputs)

    def forward(self, x: Tensor, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """[N, X] to mean and log-variance, [N, Y] float32 each.

        Args:
            x: What y is conditioned on.
            frozen: theta is held: it gets no gradient, but x does.
        """
        return self.mean(x, frozen).float(), self.log_variance(x, frozen).float().tanh()


def log_likelihood(mean: Tensor, log_variance: Tensor, y: Tensor) -> Tensor:
    """The log-likelihood log q(y_i | x_i) of each row, [N] nats; theta maximises its mean.

    Args:
        mean: [N, Y], from x.
        log_variance: [N, Y], from x.
        y: [N, Y].
    """
    squares = (y - mean).square() * (-log_variance).exp()
    return -0.5 * (squares + log_variance + math.log(2 * math.pi)).sum(1)


def vclub_by_row(mean: Tensor, log_variance: Tensor, y: Tensor, counted: Tensor) -> Tensor:
    """[N] log q(y_i | x_i) - mean_j log q(y_j | x_i); vCLUB is the mean over counted rows.

    j runs over the counted rows of this pass on all workers. The log-variances cancel.

    Args:
        mean: [N, Y], from x.
        log_variance: [N, Y], from x.
        y: [N, Y].
        counted: [N] bool, False = not a row of the batch: 0, and no part of any other's value.

    Returns:
        In nats. Summed over workers, its gradient is that of the whole double sum.
    """
    weight = torch.where(counted[:, None], 0.5 * (-log_variance).exp(), 0.0)
    y = torch.where(counted[:, None], y, 0.0)
    rows = counted.to(y.dtype).sum().expand(1, y.shape[1])
    moments = torch.stack((y, y.square(), weight, weight * mean)).sum(1)
    count, first, second, precision, pull = sum_over_workers(torch.cat((rows, moments)))
    first, second = first / count.clamp(min=1), second / count.clamp(min=1)
    by_row = weight * ((second - y.square()) - 2 * mean * (first - y))
    # What each y adds to the other rows' values through the moments: a gradient without a value.
    through = (precision * y.square() - 2 * pull * y) / count.clamp(min=1)
    return (by_row + through - through.detach()).sum(1)


class _TwoLayers(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first = _Linear(inputs, hidden)
        self.second = _Linear(hidden, outputs)

    def forward(self, x: Tensor, frozen: bool) -> Tensor:
        result: Tensor = self.second(self.first(x, frozen).relu(), frozen)
        return result


class _Linear(nn.Linear):
    """A linear map that can be held for one pass."""

    def forward(self, input: Tensor, frozen: bool = False) -> Tensor:
        if not frozen:
            return super().forward(input)
        assert self.bias is not None
        return F.linear(input, self.weight.detach(), self.bias.detach())
