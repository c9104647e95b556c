import math
from dataclasses import replace

import pytest
import torch

from data.errors import InputError
from data.tasks import TaskSpec
from fusion.losses.focal import FocalOptions, focal_by_class, focal_terms
from fusion.losses.rows import bce_by_class


def literal(logit, target, gamma, alpha):
    """Lin et al., Eq 5, in double precision."""
    p = 1 / (1 + math.exp(-logit))
    true, weight = (p, alpha) if target else (1 - p, 1 - alpha)
    return -weight * (1 - true) ** gamma * math.log(true)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_it_is_the_papers(gamma, alpha):
    logits = torch.linspace(-6, 6, 13)[:, None].expand(13, 2)
    targets = torch.tensor([0.0, 1.0]).expand(13, 2)
    found = focal_by_class(logits, targets, gamma, alpha)
    for logit, loss in zip(logits[:, 0].tolist(), found.tolist(), strict=True):
        expected = [literal(logit, target, gamma, alpha) for target in (0, 1)]
        assert loss == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_a_label_s_positives_weigh_as_much_as_train_rows_lack_it(make_batch):
    """1 - prevalence, each label its own; a task that knows none says so."""
    prevalence = (0.1, 0.5, 0.8)
    task = TaskSpec(name="x", kind="multilabel", labels=("a", "b", "c"), prevalence=prevalence)
    batch, logits = make_batch(rows=7), torch.randn(7, 3)
    options = FocalOptions(focal_alpha="prevalence")
    found = focal_terms(logits, batch, options, task)["focal"].sum
    expected = sum(
        literal(logits[row, label].item(), batch.targets[row, label] > 0, 2.0, 1 - share)
        for row in range(7)
        for label, share in enumerate(prevalence)
    )
    assert 0 < batch.targets.sum() < 21
    assert found.item() == pytest.approx(expected / 3, rel=1e-5)
    with pytest.raises(InputError, match=r"model\.focal_alpha=prevalence.*set a number"):
        focal_terms(logits, batch, options, replace(task, prevalence=()))


def test_gamma_zero_is_cross_entropy():
    """Sanity check 32."""
    logits, targets = torch.randn(40, 5) * 4, (torch.rand(40, 5) < 0.5).float()
    torch.testing.assert_close(focal_by_class(logits, targets, 0.0), bce_by_class(logits, targets))


def test_values_and_gradients_are_finite_far_out():
    logits = torch.tensor([[-200.0, -30.0, 0.0, 30.0, 200.0]]).T.repeat(1, 2).requires_grad_()
    loss = focal_by_class(logits, torch.tensor([0.0, 1.0]).expand(5, 2))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()
    assert loss[0].tolist() == pytest.approx([0, 200])
