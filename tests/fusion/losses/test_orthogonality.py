import pytest
import torch

from fusion.losses.orthogonality import absolute_cosine


def test_is_the_absolute_cosine():
    a, b = torch.randn(20, 8), torch.randn(20, 8)
    expected = torch.nn.functional.cosine_similarity(a, b).abs()
    torch.testing.assert_close(absolute_cosine(a, b), expected, atol=1e-5, rtol=1e-5)
    assert ((absolute_cosine(a, b) >= 0) & (absolute_cosine(a, b) <= 1)).all()


def test_one_for_collinear_of_either_sign_and_zero_for_orthogonal():
    a = torch.tensor([[3.0, 4.0]])
    assert absolute_cosine(a, 2 * a).item() == pytest.approx(1.0, abs=1e-5)
    assert absolute_cosine(a, -a).item() == pytest.approx(1.0, abs=1e-5)
    assert absolute_cosine(a, torch.tensor([[-4.0, 3.0]])).item() == 0.0


def test_does_not_depend_on_scale():
    a, b = torch.randn(5, 8), torch.randn(5, 8)
    torch.testing.assert_close(
        absolute_cosine(100 * a, b / 100), absolute_cosine(a, b), rtol=1e-3, atol=1e-4
    )


def test_a_vector_of_zeros_gives_zero_and_a_finite_gradient():
    a = torch.zeros(1, 4, requires_grad=True)
    b = torch.randn(1, 4, requires_grad=True)
    value = absolute_cosine(a, b)
    value.sum().backward()
    assert value.item() == 0.0
    assert torch.isfinite(a.grad).all()
    assert torch.isfinite(b.grad).all()
