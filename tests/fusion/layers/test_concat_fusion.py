import torch

from fusion.layers.concat_fusion import ConcatFusion


def test_a_row_without_an_image_gets_the_learned_vector():
    torch.manual_seed(0)
    layer = ConcatFusion(series=4, visual=6, classes=3)
    assert layer.missing.shape == (4,)
    assert (layer.missing >= 0).all()
    assert (layer.missing < 1).all()
    ehr, cxr = torch.randn(2, 4), torch.randn(2, 4)
    logits = layer(ehr, cxr, torch.tensor([True, False]))
    torch.testing.assert_close(logits[0], layer.head(torch.cat((ehr[0], cxr[0]))))
    torch.testing.assert_close(logits[1], layer.head(torch.cat((ehr[1], layer.missing))))
    logits[0].sum().backward()
    assert not layer.missing.grad.any()


def test_zeros_instead_of_a_learned_vector():
    layer = ConcatFusion(series=4, visual=6, classes=3, missing="zeros")
    assert layer.missing is None
    ehr = torch.randn(1, 4)
    logits = layer(ehr, torch.zeros(1, 4), torch.tensor([False]))
    torch.testing.assert_close(logits[0], layer.head(torch.cat((ehr[0], torch.zeros(4)))))
