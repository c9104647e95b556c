import pytest
import torch

from fusion.encoders.time_series import LSTMEncoder, TransformerEncoder


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_lstm_size_and_initialisation_at_the_papers_numbers():
    torch.manual_seed(0)
    encoder = LSTMEncoder()
    assert size(encoder) == 868_352
    for layer, inputs in zip(encoder.layers, (76, 256), strict=True):
        recurrent = layer.weight_hh_l0.detach()
        torch.testing.assert_close(recurrent.T @ recurrent, torch.eye(256), atol=1e-4, rtol=0)
        bound = (6 / (inputs + 1024)) ** 0.5
        largest = layer.weight_ih_l0.detach().abs().max().item()
        assert 0.98 * bound < largest <= bound
        assert not layer.bias_ih_l0.any()
        assert not layer.bias_hh_l0.any()


def test_lstm_gives_the_last_valid_state_of_the_second_layer():
    torch.manual_seed(0)
    encoder = LSTMEncoder(hidden=5, inputs=3).eval()
    series, lengths = torch.randn(3, 6, 3), torch.tensor([6, 1, 4])
    encoded = encoder(series, lengths)
    for row, length in enumerate(lengths.tolist()):
        states = series[row : row + 1, :length]
        for layer in encoder.layers:
            states, _ = layer(states)
        torch.testing.assert_close(encoded[row], states[0, -1])


def test_lstm_drops_out_of_the_last_state_only():
    torch.manual_seed(0)
    encoder = LSTMEncoder(hidden=400, dropout=0.3)
    series, lengths = torch.randn(2, 3, 76), torch.tensor([3, 2])
    lower = encoder.lower(series, lengths)
    assert torch.equal(lower, encoder.lower(series, lengths))
    assert not lower[1, 2:].any()
    trained, evaluated = encoder(series, lengths), encoder.eval()(series, lengths)
    dropped = trained == 0
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.05)
    torch.testing.assert_close(trained[~dropped], evaluated[~dropped] / 0.7)


def test_transformer_sizes_at_the_papers_numbers():
    encoder = TransformerEncoder(branches=2)
    layers = size(encoder.common) + size(encoder.branches)
    assert layers == 3 * 1_315_072
    assert encoder.embedding.weight.shape == (256, 76)
    assert encoder.positions.shape == (350, 256)
    assert encoder.positions.abs().max().item() <= 0.1
    assert encoder.positions.std().item() == pytest.approx(0.2 / 12**0.5, rel=0.02)


def test_transformer_branches_share_the_embedding_and_the_first_layer_only():
    torch.manual_seed(0)
    encoder = TransformerEncoder(hidden=8, heads=2, feedforward=16, branches=2)
    encoded = encoder(torch.randn(2, 4, 76), torch.tensor([4, 2]))
    assert encoded.shape == (2, 2, 8)
    assert not torch.allclose(encoded[:, 0], encoded[:, 1])
    encoded[:, 0].square().sum().backward()
    assert encoder.common.linear1.weight.grad.any()
    assert next(encoder.branches[0].parameters()).grad.any()
    assert not next(encoder.branches[1].parameters()).grad.any()


def test_transformer_equals_each_row_alone_without_mask():
    torch.manual_seed(0)
    encoder = TransformerEncoder(hidden=8, heads=2, feedforward=16, branches=1).eval()
    series, lengths = torch.randn(3, 5, 76), torch.tensor([5, 1, 3])
    encoded = encoder(series, lengths)
    for row, length in enumerate(lengths.tolist()):
        states = encoder.embedding(series[row, :length]) + encoder.positions[:length]
        states = encoder.branches[0][0](encoder.common(states[None]))
        torch.testing.assert_close(encoded[row, 0], states[0].mean(0), atol=1e-5, rtol=1e-5)


def test_transformer_sees_the_order_of_steps():
    torch.manual_seed(0)
    encoder = TransformerEncoder(hidden=8, heads=2, feedforward=16).eval()
    series, lengths = torch.randn(1, 5, 76), torch.tensor([5])
    flipped = encoder(series.flip(1), lengths)
    assert not torch.allclose(flipped, encoder(series, lengths), atol=1e-3)


def test_transformer_cuts_longer_series_to_its_positions():
    torch.manual_seed(0)
    encoder = TransformerEncoder(hidden=8, heads=2, feedforward=16, max_length=4).eval()
    series = torch.randn(2, 7, 76)
    cut = encoder(series[:, :4], torch.tensor([4, 2]))
    torch.testing.assert_close(encoder(series, torch.tensor([7, 2])), cut)
