import math

import pytest
import torch

from fusion.losses.rows import bce_by_class, rows_with, term


def test_bce_is_the_negative_log_likelihood_and_never_negative():
    logits, targets = torch.randn(4, 3), torch.randint(0, 2, (4, 3)).float()
    p = torch.sigmoid(logits)
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log())
    torch.testing.assert_close(bce_by_class(logits, targets), expected)
    perfect = bce_by_class(torch.tensor([[60.0, -60.0]]), torch.tensor([[1.0, 0.0]]))
    assert (perfect >= 0).all()
    assert perfect.sum().item() == pytest.approx(0.0, abs=1e-12)
    wrong = bce_by_class(torch.tensor([[0.0]]), torch.tensor([[1.0]]))
    assert wrong.item() == pytest.approx(math.log(2))


def test_a_term_sums_over_the_rows_that_have_every_modality(make_batch):
    batch = make_batch(
        present_cxr=[True, True, False, False], present_ehr=[True, False, True, False]
    )
    by_row = torch.tensor([1.0, 2.0, 4.0, torch.nan])
    for over, expected in ((("ehr", "cxr"), 1.0), (("cxr",), 3.0), (("ehr",), 5.0)):
        made = term(by_row, batch, over, 0.5)
        assert made.sum.item() == expected
        assert made.over == over
        assert made.scale == 0.5
    assert rows_with(batch, ()).tolist() == [True] * 4
