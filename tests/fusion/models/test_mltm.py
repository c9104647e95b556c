"""Masked lab-test modelling: what is hidden, what is never read, what it learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.errors import InputError

ITEMS = 12


def labs_batch(make_batch, labs, observed, *, epoch=0):
    rows = len(labs)
    batch = make_batch(rows=rows, steps=1)
    draws = np.arange(rows, dtype=np.uint64) + np.uint64(rows * epoch)
    present = {**batch.present, "labs": observed.any(1)}
    return replace(
        batch, labs=labs * observed, labs_observed=observed, draws=draws, present=present
    )


def random_table(make_batch, rows=40, *, columns=ITEMS, seed=0, epoch=0):
    """Rows of 0 to `columns` observed values."""
    rng = torch.Generator().manual_seed(seed)
    share = torch.linspace(0, 1, rows)[:, None]
    observed = torch.rand(rows, columns, generator=rng) < share
    return labs_batch(make_batch, torch.rand(rows, columns, generator=rng), observed, epoch=epoch)


def decoded(model, labs, seen):
    encoded = model.labs(labs, seen)
    return model.decoder(encoded.tokens, encoded.mask)


@pytest.fixture
def mltm(build):
    return lambda **options: build("mltm", **{"items": ITEMS, **options})


@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.1])
def test_of_the_observed_it_masks_the_rounded_share_and_keeps_one(mltm, make_batch, ratio):
    """Sanity check 26, reading B."""
    batch = random_table(make_batch)
    masked = mltm(mask_ratio=ratio).mask(batch, batch.labs_observed)
    assert not (masked & ~batch.labs_observed).any()
    seen = batch.labs_observed & ~masked
    missing = ~batch.labs_observed
    assert (masked.int() + seen.int() + missing.int() == 1).all()
    numbers = batch.labs_observed.sum(1).tolist()
    assert {0, ITEMS} <= set(numbers)
    for row, number in enumerate(numbers):
        assert int(masked[row].sum()) == min(round(ratio * number), max(number - 1, 0))
        assert seen[row].any() == (number > 0)


@pytest.mark.parametrize(("columns", "kept"), [(12, 3), (10, 2), (3, 1)])
def test_of_all_columns_it_keeps_a_quarter_from_the_observed(mltm, make_batch, columns, kept):
    """Sanity check 26, reading A: a row of fewer results loses none, and no missing one leaks."""
    batch = random_table(make_batch, columns=columns)
    observed = torch.nn.functional.pad(batch.labs_observed, (0, ITEMS - columns))
    masked = mltm(reading="all").mask(batch, observed)
    assert not (masked & ~observed).any()
    for row, number in enumerate(observed.sum(1).tolist()):
        assert int((observed & ~masked)[row].sum()) == min(number, kept)


@pytest.mark.parametrize("reading", ["observed", "all"])
@pytest.mark.parametrize("garbage", [1e9, float("nan")])
def test_missing_values_reach_neither_encoder_nor_loss(mltm, make_batch, reading, garbage):
    """Sanity check 26."""
    batch = random_table(make_batch)
    spoiled = replace(batch, labs=torch.where(batch.labs_observed, batch.labs, garbage))
    results = []
    for each in (batch, spoiled):
        model = mltm(reading=reading)
        output = model(each)
        sum(term.sum for term in output.terms.values()).backward()
        gradients = {name: p.grad for name, p in model.labs.named_parameters()}
        losses = {name: term.sum for name, term in output.terms.items()}
        results.append({"logits": output.logits, **losses, **gradients})
    for name, value in results[0].items():
        assert value.isfinite().all(), name
        assert torch.equal(value, results[1][name]), name


def test_masked_values_are_told_without_being_read(mltm, make_batch):
    """Sanity check 27: they change the masked loss alone; evaluation reads all that is observed."""
    batch = random_table(make_batch)
    model = mltm()
    masked = model.mask(batch, batch.labs_observed)
    other = replace(batch, labs=torch.where(masked, 1 - batch.labs, batch.labs))
    seen = batch.labs_observed & ~masked
    told = [decoded(model, each.labs, seen) for each in (batch, other)]
    assert torch.equal(*told)
    before, after = model(batch), model(other)
    assert torch.equal(before.terms["seen"].sum, after.terms["seen"].sum)
    assert before.terms["masked"].sum != after.terms["masked"].sum
    changed = (before.features["labs"] - after.features["labs"]).abs().amax(1) > 1e-7
    assert torch.equal(changed, masked.any(1))
    pooled = model.labs.pool(model.labs(batch.labs, batch.labs_observed))
    torch.testing.assert_close(model(batch).features["labs"], pooled)


def test_the_loss_is_the_literal_one(mltm, make_batch):
    """Value by value; a missing one is in neither sum."""
    batch = random_table(make_batch, rows=9)
    model = mltm()
    masked = model.mask(batch, batch.labs_observed)
    output, counts = model(batch), model.counts(batch)
    sums, numbers = {"masked": 0.0, "seen": 0.0}, {"masked": 0, "seen": 0}
    for row in range(9):
        seen = batch.labs_observed[row] & ~masked[row]
        told = decoded(model, batch.labs[row : row + 1], seen[None])[0]
        for item in batch.labs_observed[row].nonzero().squeeze(1).tolist():
            name = "masked" if masked[row, item] else "seen"
            sums[name] += (told[item].item() - batch.labs[row, item].item()) ** 2
            numbers[name] += 1
    for place, name in enumerate(model.counted):
        assert output.terms[name].sum.item() == pytest.approx(sums[name], rel=1e-5)
        assert int(counts[place]) == numbers[name]


def test_a_decoder_tells_from_tokens_and_places_literally(mltm, make_batch):
    batch = random_table(make_batch, rows=5)
    model = mltm(decoder_depth=2).eval()
    encoded = model.labs(batch.labs, batch.labs_observed)
    decoder = model.decoder
    for row in range(5):
        tokens = [decoder.embedding(encoded.tokens[row, 0])]
        for item in range(ITEMS):
            real = encoded.mask[row, item + 1]
            token = decoder.embedding(encoded.tokens[row, item + 1]) if real else decoder.unseen
            tokens.append(token + decoder.positions.table[item])
        states = torch.stack(tokens)[None]
        for block in decoder.blocks:
            states = block(states)
        raw = decoder.value(decoder.norm(states[0, 1:])).squeeze(1)
        torch.testing.assert_close(
            decoder(encoded.tokens, encoded.mask)[row], torch.sigmoid(2 * raw)
        )


@pytest.mark.parametrize("border", [1, 17, 39])
def test_a_rows_mask_depends_on_its_own_word_alone(mltm, make_batch, border):
    batch = random_table(make_batch)
    model = mltm()
    whole = model.mask(batch, batch.labs_observed)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(border)).tolist()
    for rows in (order[:border], order[border:]):
        observed = batch.labs_observed[rows]
        part = replace(batch, labs=batch.labs[rows], draws=batch.draws[rows])
        assert torch.equal(model.mask(part, observed), whole[rows])


def test_masks_are_uniform_and_change_with_the_word(mltm, make_batch):
    observed = torch.ones(4000, ITEMS, dtype=torch.bool)
    batch = labs_batch(make_batch, torch.rand(4000, ITEMS), observed)
    model = mltm()
    masked = model.mask(batch, observed).double()
    assert (masked.mean(0) - 0.75).abs().max() < 0.03
    pairs = torch.corrcoef(masked.T) - torch.eye(ITEMS)
    # Nine of twelve without replacement: any two are correlated by -1 / 11.
    assert (pairs + (1 - torch.eye(ITEMS)) / 11).abs().max() < 0.06
    later = labs_batch(make_batch, batch.labs, observed, epoch=1)
    same = (model.mask(later, observed) == masked.bool()).all(1).double().mean()
    assert same < 0.03
    assert torch.equal(model.mask(batch, observed), masked.bool())


def test_the_probe_learns_and_the_encoder_does_not_feel_it(mltm, make_batch):
    batch = random_table(make_batch)
    model = mltm()
    model(batch).logits.square().sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"probe.weight", "probe.bias"}


def test_rows_and_batches_without_labs(mltm, make_batch):
    model = mltm()
    nothing = labs_batch(make_batch, torch.rand(3, ITEMS), torch.zeros(3, ITEMS, dtype=torch.bool))
    output = model(nothing)
    assert model.counts(nothing).tolist() == [0.0, 0.0]
    assert all(term.sum == 0 for term in output.terms.values())
    assert output.logits.isfinite().all()
    assert torch.equal(output.logits[0], output.logits[2])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_columns_and_columns_that_nobody_has(mltm, make_batch, value):
    batch = random_table(make_batch)
    labs, observed = batch.labs.clone(), batch.labs_observed.clone()
    labs[:, 3], observed[:, 7] = value, False
    model = mltm()
    output = model(labs_batch(make_batch, labs, observed))
    sum(term.sum for term in output.terms.values()).backward()
    assert all(term.sum.isfinite() for term in output.terms.values())
    assert all(p.grad.isfinite().all() for p in model.labs.parameters())
    assert model.labs.embedding.weight.grad[3].any() == (value > 0)
    assert not model.labs.embedding.weight.grad[7].any()


def test_shards_without_any_lab_column_are_refused(mltm, make_batch):
    empty = torch.zeros(3, 0)
    batch = replace(make_batch(rows=3), labs=empty, labs_observed=empty.bool())
    with pytest.raises(InputError, match="these shards have none: extract them"):
        mltm()(batch)


def test_more_columns_than_the_model_are_refused(mltm, make_batch):
    with pytest.raises(InputError, match=r"has 12 columns, but the model reads 7: set model"):
        mltm(items=7)(random_table(make_batch))


def trained_ratio(mltm, make_batch, values, observed):
    """Masked RMSE over that of the columns' means, both on rows that were not trained on."""
    steps, size, known = 150, 64, 400
    model = mltm(items=values.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=steps)
    for step in range(steps):
        rows = (torch.arange(size) + step * size) % known
        batch = labs_batch(make_batch, values[rows], observed[rows], epoch=step)
        terms, counts = model(batch).terms, model.counts(batch)
        loss = sum(terms[name].sum / n for name, n in zip(model.counted, counts, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    held = labs_batch(make_batch, values[known:], observed[known:])
    masked = model.eval().mask(held, held.labs_observed)
    with torch.no_grad():
        error = model(held).terms["masked"].sum / model.counts(held)[0]
    means = torch.where(observed, values, torch.nan)[:known].nanmean(0)
    baseline = (held.labs - means).square()[masked].mean()
    return (error / baseline).sqrt().item()


def test_a_rank_one_table_is_told_far_better_than_by_its_columns_means(mltm, make_batch):
    """Sanity check 28."""
    rng = torch.Generator().manual_seed(3)
    rows, columns = torch.rand(600, 1, generator=rng), torch.rand(1, 6, generator=rng)
    values = rows * (0.3 + 0.7 * columns)
    observed = torch.rand(600, 6, generator=rng) < 0.9
    assert trained_ratio(mltm, make_batch, values, observed) < 0.2


def test_independent_columns_are_told_as_by_their_means(mltm, make_batch):
    """Sanity check 28: no better, and hardly worse."""
    rng = torch.Generator().manual_seed(3)
    values = torch.rand(600, 6, generator=rng)
    observed = torch.rand(600, 6, generator=rng) < 0.9
    assert 0.98 < trained_ratio(mltm, make_batch, values, observed) < 1.03
