import math
from itertools import product

import pytest
import torch

from fusion.layers.pooling import logit_pool, masked_mean

GRID = torch.linspace(-10, 10, 41, dtype=torch.float64)


def literal(a: float, b: float) -> float:
    mean = (1 / (1 + math.exp(-a)) + 1 / (1 + math.exp(-b))) / 2
    return math.log(mean / (1 - mean))


def test_logit_pool_is_the_logit_of_the_mean_probability():
    a, b = torch.meshgrid(GRID, GRID, indexing="ij")
    expected = torch.tensor(
        [[literal(x, y) for y in GRID.tolist()] for x in GRID.tolist()], dtype=torch.float64
    )
    torch.testing.assert_close(logit_pool(a, b), expected, atol=1e-6, rtol=0)


def test_logit_pool_is_symmetric_idempotent_and_between():
    a, b = torch.meshgrid(GRID, GRID, indexing="ij")
    pooled = logit_pool(a, b)
    torch.testing.assert_close(pooled, logit_pool(b, a))
    torch.testing.assert_close(logit_pool(GRID, GRID), GRID)
    tolerance = 1e-12
    assert (pooled >= torch.minimum(a, b) - tolerance).all()
    assert (pooled <= torch.maximum(a, b) + tolerance).all()


@pytest.mark.parametrize("size", [50.0, 100.0])
def test_logit_pool_at_the_extremes_has_finite_values_and_gradients(size):
    for x, y in product((-size, 0.0, size), repeat=2):
        a, b = torch.tensor(x, requires_grad=True), torch.tensor(y, requires_grad=True)
        pooled = logit_pool(a, b)
        pooled.backward()
        assert all(torch.isfinite(value) for value in (pooled, a.grad, b.grad))
        if x == y:
            assert pooled.item() == pytest.approx(x)
        elif x == -y:
            assert pooled.item() == pytest.approx(0.0)


def test_logit_pool_shares_the_gradient_at_equal_logits():
    for value in (-50.0, -3.0, 0.0, 8.0):
        a, b = torch.tensor(value, requires_grad=True), torch.tensor(value, requires_grad=True)
        logit_pool(a, b).backward()
        assert (a.grad + b.grad).item() == pytest.approx(1.0, abs=1e-5)


def test_logit_pool_gradient_matches_finite_differences():
    a, b = (torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(logit_pool, (a, b))


def test_logit_pool_of_bfloat16_is_computed_wide_and_returned_narrow():
    a = torch.tensor([40.0, -40.0, 3.0], dtype=torch.bfloat16)
    b = torch.tensor([40.0, 40.0, -1.0], dtype=torch.bfloat16)
    pooled = logit_pool(a, b)
    assert pooled.dtype == torch.bfloat16
    assert torch.equal(pooled, logit_pool(a.float(), b.float()).bfloat16())


def test_masked_mean_is_the_mean_over_each_rows_own_steps():
    sequence = torch.randn(3, 5, 4)
    lengths = torch.tensor([5, 1, 3])
    expected = torch.stack([sequence[row, :length].mean(0) for row, length in enumerate(lengths)])
    spoiled = sequence.clone()
    spoiled[1, 1:] = torch.nan
    spoiled[2, 3:] = torch.inf
    torch.testing.assert_close(masked_mean(spoiled, lengths), expected)
