from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fusion.losses.ranking import attention_ranking


def pairwise_margin_ranking(attention: Tensor, losses: Tensor, margin: float = 0.0) -> Tensor:
    """The released code's form, for comparison: no mean over rows, so not a term of training.

    For each unordered pair a margin ranking loss whose target is the sign of the difference of
    losses, summed over all rows and classes and divided by the number of entries above zero; then
    the mean over pairs. It differs from `attention_ranking` by that divisor, which depends on the
    data of all rows at once.

    Args:
        attention: [B, C, N] weights of the paired rows.
        losses: [B, C, N] loss of each representation's own head.
        margin: The code's value is 0.

    Returns:
        A scalar, >= 0.
    """
    fixed = losses.detach()
    pairs = []
    for i, j in combinations(range(attention.shape[-1]), 2):
        target = torch.sign(fixed[..., j] - fixed[..., i])
        entries = (margin - target * (attention[..., i] - attention[..., j])).clamp_min(0.0)
        pairs.append(entries.sum() / (entries > 0).sum().clamp_min(1))
    return torch.stack(pairs).mean()


def literal(attention: torch.Tensor, losses: torch.Tensor, margin: float) -> torch.Tensor:
    B, C, N = attention.shape
    rows = torch.zeros(B)
    for b in range(B):
        for c in range(C):
            for i in range(N):
                for j in range(N):
                    if j != i and losses[b, c, i] < losses[b, c, j]:
                        gap = attention[b, c, j] - attention[b, c, i] + margin
                        rows[b] += max(0.0, gap.item())
        rows[b] /= 2 * C
    return rows


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_equals_the_mended_equation(margin):
    attention, losses = torch.randn(4, 5, 3).softmax(-1), torch.rand(4, 5, 3)
    torch.testing.assert_close(
        attention_ranking(attention, losses, margin), literal(attention, losses, margin)
    )


def test_zero_when_the_better_has_more_and_pulls_up_the_better_when_swapped():
    losses = torch.tensor([[[0.1, 0.5, 0.9]]])
    agreeing = torch.tensor([[[0.6, 0.3, 0.1]]])
    assert attention_ranking(agreeing, losses).item() == 0.0
    swapped = torch.tensor([[[0.3, 0.6, 0.1]]], requires_grad=True)
    value = attention_ranking(swapped, losses)
    assert value.item() == pytest.approx(0.15)
    value.sum().backward()
    assert swapped.grad[0, 0].tolist() == [-0.5, 0.5, 0.0]


def test_a_margin_asks_for_a_lead():
    losses = torch.tensor([[[0.1, 0.5, 0.9]]])
    close = torch.tensor([[[0.36, 0.33, 0.31]]])
    assert attention_ranking(close, losses).item() == 0.0
    assert attention_ranking(close, losses, margin=0.04).item() == pytest.approx(0.015, abs=1e-6)


@pytest.mark.parametrize("form", [attention_ranking, pairwise_margin_ranking])
def test_losses_only_rank(form):
    attention = torch.rand(2, 3, 3, requires_grad=True)
    losses = torch.rand(2, 3, 3, requires_grad=True)
    form(attention, losses).sum().backward()
    assert attention.grad is not None
    assert losses.grad is None


@pytest.mark.parametrize("form", [attention_ranking, pairwise_margin_ranking])
def test_permuting_the_modalities_consistently_changes_nothing(form):
    attention, losses = torch.rand(2, 3, 3), torch.rand(2, 3, 3)
    order = [2, 0, 1]
    torch.testing.assert_close(
        form(attention[..., order], losses[..., order], 0.05), form(attention, losses, 0.05)
    )


def test_the_codes_form_divides_by_its_positive_entries():
    torch.manual_seed(0)
    attention, losses = torch.rand(4, 5, 3), torch.rand(4, 5, 3)
    pairs = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        target = torch.sign(losses[..., j] - losses[..., i])
        entries = F.margin_ranking_loss(
            attention[..., i], attention[..., j], target, reduction="none"
        )
        pairs.append(entries.sum() / (entries > 0).sum())
    value = pairwise_margin_ranking(attention, losses)
    torch.testing.assert_close(value, torch.stack(pairs).mean())
    assert value.item() != pytest.approx(
        attention_ranking(attention, losses).mean().item(), rel=0.1
    )
    losses = -attention
    assert pairwise_margin_ranking(attention, losses).item() == 0.0
