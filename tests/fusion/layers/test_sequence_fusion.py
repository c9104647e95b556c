import torch
from torch import nn

from fusion.layers.sequence_fusion import SequenceFusion

YES, NO = torch.tensor([True]), torch.tensor([False])


def fusion() -> SequenceFusion:
    torch.manual_seed(0)
    return SequenceFusion(inputs=5, hidden=7)


def test_size_at_the_papers_numbers():
    layer = SequenceFusion()
    assert sum(p.numel() for p in layer.parameters()) == 1_576_960


def test_a_row_without_an_image_is_one_run_of_the_cell_on_the_series():
    layer = fusion()
    cell = nn.LSTMCell(5, 7)
    cell.load_state_dict(
        {name.removesuffix("_l0"): value for name, value in layer.lstm.state_dict().items()}
    )
    ehr, image = torch.randn(1, 5), torch.randn(1, 5)
    state, _ = cell(ehr)
    torch.testing.assert_close(layer(ehr, image, YES, NO), state)
    torch.testing.assert_close(layer(image, ehr, NO, YES), state)
    second, _ = cell(image, cell(ehr))
    torch.testing.assert_close(layer(ehr, image, YES, YES), second)


def test_a_mixed_batch_equals_packed_rows_one_by_one():
    layer = fusion()
    ehr, cxr = torch.randn(4, 5), torch.randn(4, 5)
    has_cxr = torch.tensor([True, False, False, True])
    together = layer(ehr, cxr, torch.ones(4, dtype=torch.bool), has_cxr)
    for row in range(4):
        tokens = [ehr[row], cxr[row]][: 1 + int(has_cxr[row])]
        _, (hidden, _) = layer.lstm(torch.stack(tokens)[None])
        torch.testing.assert_close(together[row], hidden[-1, 0], atol=1e-5, rtol=1e-5)


def test_the_order_of_the_modalities_matters():
    layer = fusion()
    ehr, cxr = torch.randn(1, 5), torch.randn(1, 5)
    assert not torch.allclose(layer(ehr, cxr, YES, YES), layer(cxr, ehr, YES, YES), atol=1e-3)


def test_a_row_with_neither_has_a_state_of_zeros():
    layer = fusion()
    assert not layer(torch.randn(1, 5), torch.randn(1, 5), NO, NO).any()
