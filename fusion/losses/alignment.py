"""Alignment of two representations read as the logits of independent Bernoulli variables."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LN2 = math.log(2.0)


def bernoulli_jsd(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon divergence of Bernoulli(sigmoid(a)) and Bernoulli(sigmoid(b)), elementwise.

    DrFuse Eq 1 with both terms of each Bernoulli KL, computed from the logits: in [0, ln 2], zero
    iff they are equal, symmetric, finite with finite gradients for any finite logits.

    Returns:
        The shape of the inputs, float32 at least; the loss sums it over features.
    """
    a, b = _wide(first), _wide(second)
    return _half(a, b) + _half(-a, -b)


def one_sided_jsd(first: Tensor, second: Tensor) -> Tensor:
    """The released DrFuse code's form: only the p log(p / m) terms; no divergence.

    About half of `bernoulli_jsd` on logits near zero, and not symmetric under a change of sign of
    both. Computed from the logits, so that it does not become NaN where a sigmoid rounds to 0.
    """
    return _half(_wide(first), _wide(second))


def squared_distance(first: Tensor, second: Tensor) -> Tensor:
    """(a - b)^2, elementwise: the ablation "MSE alignment" (DrFuse, section 4.4)."""
    return (_wide(first) - _wide(second)).square()


def _half(a: Tensor, b: Tensor) -> Tensor:
    """[p log(p/m) + q log(q/m)] / 2 with p, q the sigmoids and m their mean."""
    log_p, log_q = F.logsigmoid(a), F.logsigmoid(b)
    log_m = torch.logaddexp(log_p, log_q) - LN2
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m))


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
