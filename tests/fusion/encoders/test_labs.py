import pytest
import torch
from pydantic import ValidationError

from data.errors import InputError
from fusion.encoders.labs import LabEncoder, LabOptions, sines

OPTIONS = {"dim": 8, "heads": 2, "encoder_depth": 2, "mlp_ratio": 2}
VARIANTS = [
    {},
    {"shared_wb": True},
    {"positions": "sincos"},
    {"pool": "mean"},
    {"shared_wb": True, "positions": "sincos", "pool": "mean"},
]


@pytest.fixture(params=VARIANTS, ids=lambda given: "-".join(given) or "default")
def encoder(request) -> LabEncoder:
    torch.manual_seed(0)
    return LabEncoder(LabOptions(**OPTIONS, **request.param), items=6).eval()


@pytest.fixture
def table() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 6 items: all, some, one, none."""
    rng = torch.Generator().manual_seed(1)
    observed = torch.tensor(
        [[True] * 6, [True, False] * 3, [False] * 5 + [True], [False] * 6], dtype=torch.bool
    )
    return torch.rand(4, 6, generator=rng), observed


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("garbage", [1e9, float("nan"), float("inf")])
def test_what_is_not_seen_is_never_read(encoder, table, garbage, training):
    encoder.train(training)
    labs, observed = table
    spoiled = torch.where(observed, labs, garbage)
    results = []
    for values in (labs, spoiled):
        encoder.zero_grad(set_to_none=True)
        encoded = encoder(values, observed)
        pooled = encoder.pool(encoded)
        (encoded.tokens.square().sum() + pooled.sum()).backward()
        gradients = {name: p.grad for name, p in encoder.named_parameters()}
        results.append({"tokens": encoded.tokens, "pooled": pooled, **gradients})
    for name, value in results[0].items():
        assert value.isfinite().all(), name
        assert torch.equal(value, results[1][name]), name


def test_a_row_is_what_its_seen_items_alone_give(encoder, table):
    """The literal slow version: a sequence of the items seen, without any mask."""
    labs, observed = table
    encoded = encoder(labs, observed)
    pooled = encoder.pool(encoded)
    shared, embedding = encoder.options.shared_wb, encoder.embedding
    for row in range(len(labs)):
        seen = observed[row].nonzero().squeeze(1).tolist()
        tokens = [embedding.cls]
        for item in seen:
            column = 0 if shared else item
            value = (
                labs[row, item] * encoder.embedding.weight[column] + encoder.embedding.bias[column]
            )
            tokens.append(value + encoder.embedding.positions.table[item])
        states = torch.stack(tokens)[None]
        for block in encoder.blocks:
            states = block(states)
        states = encoder.norm(states)[0]
        real = [0] + [item + 1 for item in seen]
        assert encoded.mask[row].nonzero().squeeze(1).tolist() == real
        torch.testing.assert_close(encoded.tokens[row, real], states, atol=1e-5, rtol=1e-5)
        expected = states[0] if encoder.options.pool == "cls" else states.mean(0)
        torch.testing.assert_close(pooled[row], expected, atol=1e-5, rtol=1e-5)


def test_it_is_equivariant_to_the_order_of_items_with_their_positions(encoder, table):
    """Sanity check 27."""
    labs, observed = table
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    usual = encoder(labs, observed)
    with torch.no_grad():
        encoder.embedding.positions.table.copy_(encoder.embedding.positions.table[order])
        if not encoder.options.shared_wb:
            encoder.embedding.weight.copy_(encoder.embedding.weight[order])
            encoder.embedding.bias.copy_(encoder.embedding.bias[order])
    moved = encoder(labs[:, order], observed[:, order])
    torch.testing.assert_close(moved.tokens[:, 0], usual.tokens[:, 0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        moved.tokens[:, 1:], usual.tokens[:, 1:][:, order], atol=1e-6, rtol=1e-5
    )


def test_every_seen_value_reaches_every_token_and_the_item_matters(encoder, table):
    labs, observed = table
    usual = encoder(labs, observed).tokens
    for item in range(6):
        changed = labs.clone()
        changed[0, item] = 1 - changed[0, item]
        moved = (encoder(changed, observed).tokens[0] - usual[0]).abs().amax(1)
        assert (moved > 1e-6).all()
    swapped = encoder(labs.flip(1), observed.flip(1)).tokens[0, 0]
    assert (swapped - usual[0, 0]).abs().max() > 1e-5


def test_sizes_at_the_default_numbers():
    encoder = LabEncoder(LabOptions(), items=100)
    block = 4 * 64 * 64 + 4 * 64 + 2 * 64 * 256 + 256 + 64 + 4 * 64
    assert sum(p.numel() for p in encoder.blocks.parameters()) == 8 * block
    outside = 3 * 100 * 64 + 64 + 2 * 64
    assert sum(p.numel() for p in encoder.parameters()) == 8 * block + outside
    assert encoder.width == 64
    shared = LabEncoder(LabOptions(shared_wb=True, positions="sincos"), items=100)
    assert sum(p.numel() for p in shared.parameters()) == 8 * block + 2 * 64 + 64 + 2 * 64


def test_sines_literally():
    table = sines(5, 4)
    for place in range(5):
        for half in range(2):
            angle = torch.tensor((place + 1) / 10_000 ** (2 * half / 4))
            torch.testing.assert_close(table[place, half], angle.sin())
            torch.testing.assert_close(table[place, half + 2], angle.cos())


def test_no_items_are_refused():
    with pytest.raises(InputError, match="at least one item, but got 0"):
        LabEncoder(LabOptions(), items=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"dim": 10, "heads": 4}, "must divide dim"), ({"dim": 9, "heads": 3}, None)],
)
def test_widths_that_do_not_fit_are_refused(options, said):
    if said is None:
        options, said = {**options, "positions": "sincos"}, "must be even"
    with pytest.raises(ValidationError, match=said):
        LabOptions(**options)
