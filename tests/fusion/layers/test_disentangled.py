"""The disentangled transformer against its formulas, row by row, token by token, head by head."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fusion.layers.disentangled import DisentangledTransformer, outer_product

SIZES = {"inputs": (12, 6), "tokens": 4, "token_width": 5, "width": 8, "heads": 2}


@pytest.fixture
def build():
    def make(**options):
        torch.manual_seed(0)
        return DisentangledTransformer(**{**SIZES, **options}).eval()

    return make


@pytest.fixture
def vectors():
    torch.manual_seed(1)
    return torch.randn(3, 12), torch.randn(3, 6)


def attention(query, keys, values, heads):
    """softmax(q K^T / sqrt(d_h)) V of one row, head by head."""
    size = query.shape[1] // heads
    parts = []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        scores = query[:, own] @ keys[:, own].T / size**0.5
        parts.append(scores.softmax(1) @ values[:, own])
    return torch.cat(parts, 1)


def literal_layer(layer, states):
    """S_a, S_b, S_c of one row, from METHODS' lines."""
    q, k, v = {}, {}, {}
    for name, projection, state in zip("abc", layer.projections, states, strict=True):
        norm, linear = projection
        weights, biases = linear.weight.chunk(3), linear.bias.chunk(3)
        normed = norm(state)
        q[name], k[name], v[name] = (
            normed @ w.T + bias for w, bias in zip(weights, biases, strict=True)
        )
    mixed = {
        "a": attention(q["a"], k["a"], v["a"], layer.heads),
        "b": attention(q["b"], k["b"], v["b"], layer.heads),
        "c": attention(q["c"], k["c"] + k["a"] + k["b"], v["c"] + v["a"] + v["b"], layer.heads),
    }
    found = []
    for name, state, output, network in zip(
        "abc", states, layer.outputs, layer.feedforward, strict=True
    ):
        attended = state + mixed[name] @ output[0].weight.T + output[0].bias
        norm, first, _, _, second, _ = network
        found.append(attended + second(F.gelu(first(norm(attended)))))
    return found


def literal(model, first, second):
    """One row: its tokens, their products entry by entry, the layers, the means."""
    a, b = (
        tokens[1](tokens[0](vector)).view(model.shape)
        for tokens, vector in zip(model.tokens, (first, second), strict=True)
    )
    products = []
    for t in range(len(a)):
        row = [*a[t], torch.ones(())] if model.append_one else list(a[t])
        column = [*b[t], torch.ones(())] if model.append_one else list(b[t])
        products.append(torch.stack([x * y for x in row for y in column]))
    states = [
        stream[1](stream[0](given)) + position
        for stream, given, position in zip(
            model.streams, (a, b, torch.stack(products)), model.positions, strict=True
        )
    ]
    for layer in model.layers:
        states = literal_layer(layer, states)
    return [state.mean(0) for state in states]


@pytest.mark.parametrize("options", [{}, {"layers": 2}, {"append_one": True}])
def test_it_is_the_formulas_row_by_row(build, vectors, options):
    model = build(**options)
    found = model(*vectors)
    for row in range(3):
        expected = literal(model, vectors[0][row], vectors[1][row])
        for whole, alone in zip(found, expected, strict=True):
            torch.testing.assert_close(whole[row], alone, atol=1e-5, rtol=1e-5)


def test_patients_are_not_mixed(build, vectors):
    """Sanity check 31."""
    model, order = build(layers=2), torch.tensor([2, 0, 1])
    swapped = model(*(vector[order] for vector in vectors))
    for found, expected in zip(swapped, model(*vectors), strict=True):
        torch.testing.assert_close(found, expected[order])


@pytest.mark.parametrize("changed", [0, 1])
def test_what_is_common_depends_on_both_and_what_is_specific_on_one(build, vectors, changed):
    """Sanity check 31."""
    model = build(layers=2)
    before = model(*vectors)
    other = list(vectors)
    other[changed] = torch.randn_like(other[changed])
    moved = [bool((x - y).abs().max() > 1e-3) for x, y in zip(before, model(*other), strict=True)]
    assert moved == [changed == 0, changed == 1, True]


def test_keys_and_values_of_both_reach_the_common_stream(build, vectors):
    """Without Z_c's own dependence on A and B, through the products, S_c still moves with each."""
    model = build()
    with torch.no_grad():
        model.streams[2][0].weight.zero_()
    before = model(*vectors)[2]
    for changed in (0, 1):
        other = list(vectors)
        other[changed] = torch.randn_like(other[changed])
        assert (model(*other)[2] - before).abs().max() > 1e-3


def test_the_appended_one_keeps_both_vectors():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    product = outer_product(a, b, append_one=True)
    assert product.shape == (2, 3, 5, 6)
    assert torch.equal(product[..., -1], torch.cat((a, torch.ones(2, 3, 1)), -1))
    assert torch.equal(product[:, :, -1, :-1], b)
    assert torch.equal(product[:, :, :-1, :-1], outer_product(a, b))


def test_the_papers_sizes():
    model = DisentangledTransformer(inputs=(4096, 64))
    assert model.streams[2][0].in_features == 4096
    outputs = model(torch.randn(2, 4096), torch.randn(2, 64))
    assert [tuple(output.shape) for output in outputs] == [(2, 256)] * 3


def test_dropout_acts_in_training_only(build, vectors):
    model = build(dropout=0.5)
    assert torch.equal(model(*vectors)[2], model(*vectors)[2])
    model.train()
    assert not torch.equal(model(*vectors)[2], model(*vectors)[2])
