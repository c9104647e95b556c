import pytest
import torch

from fusion.layers.daft import AffineTransform
from fusion.layers.mmtm import TransferModule


@pytest.mark.parametrize(("channels", "width"), [(256, 256), (512, 384)])
def test_mmtm_sizes_at_stages_3_and_4(channels, width):
    layer = TransferModule(visual=channels, series=256)
    assert layer.squeeze.weight.shape == (width, channels + 256)
    visual, series = layer(torch.randn(2, channels), torch.randn(2, 256))
    assert visual.shape == (2, channels)
    assert series.shape == (2, 256)
    for gate in (visual, series):
        assert ((gate > 0) & (gate < 1)).all()


def test_mmtm_gates_each_modality_by_both():
    torch.manual_seed(0)
    layer = TransferModule(visual=8, series=8)
    visual, series = torch.randn(1, 8, requires_grad=True), torch.randn(1, 8, requires_grad=True)
    for gate in layer(visual, series):
        for source in torch.autograd.grad(gate.sum(), (visual, series), retain_graph=True):
            assert source.any()


@pytest.mark.parametrize(("channels", "bottleneck"), [(64, 11), (128, 20), (256, 38), (512, 75)])
def test_daft_bottleneck(channels, bottleneck):
    layer = AffineTransform(visual=channels, series=256)
    assert layer.squeeze.weight.shape == (bottleneck, channels + 256)
    assert layer.affine.weight.shape == (512, bottleneck)
    assert layer.squeeze.bias is None
    assert layer.affine.bias is None


def test_daft_scale_comes_first_and_is_linear():
    layer = AffineTransform(visual=16, series=4)
    with torch.no_grad():
        layer.squeeze.weight.fill_(0.1)
        layer.affine.weight[:4] = -3.0
        layer.affine.weight[4:] = 5.0
    scale, shift = layer(torch.ones(1, 16), torch.ones(1, 4))
    assert (scale < -1).all()
    assert (shift > 1).all()
