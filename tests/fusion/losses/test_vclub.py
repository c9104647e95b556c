"""vCLUB against the double sum as it is written, and against closed forms for Gaussians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributed

from fusion.collective import collective_statistics
from fusion.losses.vclub import ConditionalGaussian, log_likelihood, vclub_by_row

D = 20


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def double_sum(mean, log_variance, y):
    """Eq 1 word for word: 1/N^2 sum_i sum_j [log q(y_i | x_i) - log q(y_j | x_i)]."""
    total = torch.zeros(())
    for i in range(len(y)):
        q = torch.distributions.Normal(mean[i], (0.5 * log_variance[i]).exp())
        for j in range(len(y)):
            total = total + q.log_prob(y[i]).sum() - q.log_prob(y[j]).sum()
    return total / len(y) ** 2


def everyone(y):
    return torch.ones(len(y), dtype=torch.bool)


@pytest.fixture
def drawn():
    torch.manual_seed(0)
    mean, log_variance, y = (torch.randn(7, 5, requires_grad=True) for _ in range(3))
    return mean, log_variance, y


def test_one_pass_over_the_rows_is_the_double_sum_with_its_gradients(drawn):
    """Sanity check 30."""
    expected = double_sum(*drawn)
    found = vclub_by_row(*drawn, everyone(drawn[2])).mean()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad(expected, drawn)
    for gradient, literal in zip(torch.autograd.grad(found, drawn), wanted, strict=True):
        torch.testing.assert_close(gradient, literal, atol=1e-5, rtol=1e-5)


def test_rows_that_do_not_count_are_not_there(drawn):
    counted = torch.tensor([True, False, True, True, False, True, True])
    found = vclub_by_row(*drawn, counted)
    assert not found[~counted].any()
    expected = vclub_by_row(*(value[counted] for value in drawn), everyone(found[counted]))
    torch.testing.assert_close(found[counted], expected)
    for gradient in torch.autograd.grad(found.sum(), drawn):
        assert not gradient[~counted].any()
    nobody = vclub_by_row(*drawn, torch.zeros(7, dtype=torch.bool))
    assert nobody.tolist() == [0.0] * 7


def test_the_log_likelihood_is_that_of_a_gaussian(drawn):
    mean, log_variance, y = drawn
    scales = (0.5 * log_variance).exp()
    expected = torch.distributions.Normal(mean, scales).log_prob(y).sum(1)
    torch.testing.assert_close(log_likelihood(*drawn), expected)


def test_shares_of_two_workers_add_up_to_the_whole(drawn, monkeypatch):
    """Values and gradients: each worker's own rows, the moments of all."""
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    parts = [[value[rows] for value in drawn] for rows in (slice(0, 5), slice(5, 7))]
    sent = []
    with collective_statistics():
        monkeypatch.setattr(distributed, "all_reduce", lambda total: sent.append(total.clone()))
        for part in parts:
            vclub_by_row(*part, everyone(part[2]))
        whole = sum(sent)
        monkeypatch.setattr(distributed, "all_reduce", lambda total: total.copy_(whole))
        found = [vclub_by_row(*part, everyone(part[2])) for part in parts]
    expected = vclub_by_row(*drawn, everyone(drawn[2]))
    torch.testing.assert_close(torch.cat(found), expected)
    gradients = [torch.autograd.grad(each.sum(), drawn, retain_graph=True) for each in found]
    for own, literal in zip(
        map(sum, zip(*gradients, strict=True)),
        torch.autograd.grad(expected.sum(), drawn),
        strict=True,
    ):
        torch.testing.assert_close(own, literal)
    alone = vclub_by_row(*parts[0], everyone(parts[0][2]))
    assert (alone - expected[:5]).abs().max() > 0.1, "outside of such a pass: own rows only"


def test_held_theta_gets_no_gradient_and_detached_inputs_give_none(drawn):
    """Sanity check 30."""
    torch.manual_seed(1)
    q = ConditionalGaussian(inputs=5, outputs=5, hidden=8)
    x, _, y = drawn
    vclub_by_row(*q(x, True), y, everyone(y)).mean().backward()
    assert all(parameter.grad is None for parameter in q.parameters())
    assert x.grad.any()
    assert y.grad.any()
    x.grad = y.grad = None
    torch.testing.assert_close(q(x, True), q(x, False))
    (-log_likelihood(*q(x.detach()), y.detach())).mean().backward()
    assert all(parameter.grad.any() for parameter in q.parameters())
    assert x.grad is None
    assert y.grad is None


def gaussian_pairs(rho, rows, generator):
    x = torch.randn(rows, D, generator=generator)
    noise = torch.randn(rows, D, generator=generator)
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def fitted(rho, *, steps=500, permute=False):
    """The estimate on fresh pairs of a critic fitted to others."""
    rng = torch.Generator().manual_seed(2)
    torch.manual_seed(2)
    q = ConditionalGaussian(inputs=D, outputs=D, hidden=64)
    optimizer = torch.optim.Adam(q.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def pairs(rows):
        x, y = gaussian_pairs(rho, rows, rng)
        return x, y[torch.randperm(rows, generator=rng)] if permute else y

    for _ in range(steps):
        x, y = pairs(256)
        optimizer.zero_grad()
        (-log_likelihood(*q(x), y)).mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        x, y = pairs(20_000)
        return float(vclub_by_row(*q(x, True), y, everyone(y)).mean())


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_with_the_true_conditional_it_is_the_closed_form(rho):
    """Sanity check 29: d rho^2 / (1 - rho^2), above the information -d/2 log(1 - rho^2)."""
    x, y = gaussian_pairs(rho, 200_000, torch.Generator().manual_seed(0))
    log_variance = torch.full_like(x, math.log(1 - rho**2))
    found = float(vclub_by_row(rho * x, log_variance, y, everyone(y)).mean())
    exact = D * rho**2 / (1 - rho**2)
    assert found == pytest.approx(exact, rel=0.01, abs=0.01)
    assert found >= -D / 2 * math.log(1 - rho**2) - 0.01


@pytest.mark.parametrize(
    ("rho", "expected", "information"),
    [(0.5, 6.44, 2.877), (0.8, 34.06, 10.22)],
)
def test_a_fitted_critic_finds_the_closed_form_but_for_what_it_has_not_learnt(
    rho, expected, information
):
    """Sanity check 29: 6.667 and 35.56 with the true conditional."""
    found = fitted(rho)
    assert found == pytest.approx(expected, rel=0.025)
    assert found > information


@pytest.mark.parametrize("permute", [False, True])
def test_a_fitted_critic_finds_nothing_where_there_is_nothing(permute):
    """Sanity checks 29 and 30: independent pairs, and dependent ones whose y is shuffled."""
    assert abs(fitted(0.5 if permute else 0.0, permute=permute)) < 0.05
