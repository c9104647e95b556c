"""Fresh critics against the closed forms for Gaussians, and where there is nothing to find."""

from __future__ import annotations

import math

import pytest
import torch

from fusion.losses.held_out import info_nce, information


def gaussians(rows: int, width: int, rho: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, width, generator=generator)
    return x, rho * x + math.sqrt(1 - rho**2) * torch.randn(rows, width, generator=generator)


def test_bounds_lie_on_both_sides_of_the_known_information() -> None:
    """I = -w/2 log(1 - rho^2), and CLUB under the true conditional is w rho^2 / (1 - rho^2)."""
    x, y = gaussians(3000, 2, 0.6)
    found = information(3 * x + 7, y / 5)  # the scale of either is no matter
    known = -math.log(1 - 0.36)
    club = 2 * 0.36 / 0.64
    assert found["vclub"] == pytest.approx(club, rel=0.15)
    assert 0.6 * known < found["info_nce"] < known + 0.05 < found["vclub"]


def test_independent_or_collapsed_rows_hold_nothing() -> None:
    x, _ = gaussians(1000, 4, 0.5)
    y = torch.randn(1000, 4, generator=torch.Generator().manual_seed(6))
    found = information(x, y)
    assert abs(found["vclub"]) < 0.15
    assert found["info_nce"] < 0.05
    assert information(x, torch.zeros(1000, 4))["vclub"] == pytest.approx(0.0, abs=0.05)
    with pytest.raises(ValueError, match="19 rows"):
        information(x[:19], y[:19])


def test_a_relation_without_correlation_is_found() -> None:
    """y is told by the product of two signs of x: no linear critic sees it."""
    x, noise = gaussians(1500, 2, 0.0)
    found = information(x, x.sign().prod(1, keepdim=True) + 0.3 * noise[:, :1])
    assert min(found.values()) > 0.3


def test_info_nce_is_its_formula() -> None:
    scores = torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).double()
    slow = sum(
        math.log(scores[i, i].exp() / (sum(scores[i, j].exp() for j in range(5)) / 5))
        for i in range(5)
    )
    assert float(info_nce(scores)) == pytest.approx(slow / 5)
    assert float(info_nce(1e3 * torch.eye(8))) == pytest.approx(math.log(8))
