import math

import numpy as np
import pytest
import torch

from fusion.losses.alignment import bernoulli_jsd, one_sided_jsd, squared_distance

GRID = torch.linspace(-12, 12, 49, dtype=torch.float64)
FORMS = pytest.mark.parametrize("form", [bernoulli_jsd, one_sided_jsd])


def literal(a: float, b: float, both: bool) -> float:
    p, q = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
    m = (p + q) / 2

    def kl(x: float) -> float:
        return x * math.log(x / m) + both * (1 - x) * math.log((1 - x) / (1 - m))

    return (kl(p) + kl(q)) / 2


@FORMS
def test_equals_the_definition(form):
    pairs = torch.cartesian_prod(GRID, GRID)
    both = form is bernoulli_jsd
    expected = torch.tensor([literal(a, b, both) for a, b in pairs.tolist()], dtype=torch.float64)
    torch.testing.assert_close(form(pairs[:, 0], pairs[:, 1]), expected, atol=1e-9, rtol=1e-7)


def test_each_element_lies_between_zero_and_ln_2_and_is_zero_iff_equal():
    a, b = torch.meshgrid(GRID, GRID, indexing="ij")
    value = bernoulli_jsd(a, b)
    assert (value >= -1e-15).all()
    assert (value <= math.log(2) + 1e-12).all()
    assert (value.diagonal().abs() < 1e-15).all()
    assert (value[a != b] > 0).all()
    extreme = bernoulli_jsd(torch.tensor([100.0]), torch.tensor([-100.0]))
    assert extreme.item() == pytest.approx(math.log(2))


def test_symmetries_of_the_full_form_which_the_one_sided_form_lacks():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(8_000, 256, generator=generator) for _ in range(2))
    full, half = bernoulli_jsd(a, b), one_sided_jsd(a, b)
    torch.testing.assert_close(full, bernoulli_jsd(b, a))
    torch.testing.assert_close(full, bernoulli_jsd(-a, -b), atol=1e-6, rtol=1e-4)
    assert not torch.allclose(half[:10], one_sided_jsd(-a[:10], -b[:10]), atol=1e-3)
    assert full.sum(1).mean().item() == pytest.approx(256 * expectation(bernoulli_jsd), abs=0.05)
    assert half.sum(1).mean().item() == pytest.approx(256 * expectation(one_sided_jsd), abs=0.05)
    assert half.sum().item() == pytest.approx(full.sum().item() / 2, rel=0.01)
    # A single draw of the sums over 256 features once gave 12.85 and 6.45.
    assert abs(12.85 - full.sum(1).mean()) < full.sum(1).std()
    assert abs(6.45 - half.sum(1).mean()) < half.sum(1).std()


def expectation(form) -> float:
    """Over two N(0, 1) logits, by Gauss-Hermite quadrature (0.0484 for the full form)."""
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    a, b = np.meshgrid(points, points)
    values = form(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    return float((values * np.outer(weights, weights)).sum() / weights.sum() ** 2)


@FORMS
def test_finite_with_finite_gradients_at_the_extremes(form):
    values = torch.tensor([-100.0, -50.0, 0.0, 50.0, 100.0])
    pairs = torch.cartesian_prod(values, values).requires_grad_()
    result = form(pairs[:, 0], pairs[:, 1])
    result.sum().backward()
    assert torch.isfinite(result).all()
    assert torch.isfinite(pairs.grad).all()


@FORMS
def test_gradients_match_finite_differences(form):
    a, b = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(form, (a, b))


def test_squared_distance_is_elementwise_and_wide():
    a, b = torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([4.0, 2.0])
    assert squared_distance(a, b).tolist() == [9.0, 0.0]
