from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.plan import (
    Purpose,
    SamplePlan,
    blocks_of,
    draw,
    permutation,
    row_words,
    select_rows,
    split_evenly,
    uniform,
    withheld,
)


def _plan(rows=100, batch_size=16, seed=0, **kwargs):
    kwargs = {"shuffle": True, "window": 3, **kwargs}
    return SamplePlan(blocks_of(np.arange(rows), 10), batch_size, seed, **kwargs)


def _epoch(plan, epoch):
    return np.concatenate([plan.batch(epoch, step) for step in range(plan.steps_per_epoch)])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    block=st.integers(1, 40),
    window=st.integers(1, 9),
    batch=st.integers(1, 33),
    world=st.integers(1, 7),
    epoch=st.integers(0, 2**40),
    seed=st.integers(0, 2**64 - 1),
)
def test_each_row_once_an_epoch_for_any_world(rows, block, window, batch, world, epoch, seed):
    plan = SamplePlan(blocks_of(np.arange(rows), block), batch, seed, shuffle=True, window=window)
    assert plan.steps_per_epoch == -(-rows // batch)
    seen = []
    for step in range(plan.steps_per_epoch):
        shares = [plan.share(epoch, step, rank, world) for rank in range(world)]
        whole = np.concatenate(shares)
        assert whole.tolist() == plan.batch(epoch, step).tolist()
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 1
        assert lengths == sorted(lengths, reverse=True)
        seen += whole.tolist()
    assert sorted(seen) == list(range(rows))


def test_sixteen_rows_on_three_workers():
    plan = _plan(16)
    assert [len(plan.share(0, 0, rank, 3)) for rank in range(3)] == [6, 5, 5]


def test_the_order_is_a_pure_function_of_seed_epoch_and_position():
    used = _plan()
    for epoch in (3, 0, 7):
        _epoch(used, epoch)
    for epoch in (0, 7, 1):
        fresh = _plan()
        for step in (5, 0, 6, 2):
            assert fresh.batch(epoch, step).tolist() == used.batch(epoch, step).tolist()
    orders = {tuple(_epoch(_plan(seed=seed), epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_the_order_is_the_same_on_every_machine():
    """A frozen order: a change of it would break every run that is to be resumed."""
    assert _plan(20, 5).batch(0, 0).tolist() == [16, 0, 3, 8, 17]
    assert draw(1, Purpose.AUGMENT, 2, 3, 2).tolist() == [3954440955156383741, 7767186680767778740]


def test_rows_mix_within_a_window_of_blocks_only():
    order = _epoch(_plan(window=3), 0) // 10
    windows = [set(order[start : start + 30].tolist()) for start in range(0, 100, 30)]
    assert [len(blocks) for blocks in windows] == [3, 3, 3, 1]
    assert len(set.union(*windows)) == 10
    assert order[:30].tolist() != sorted(order[:30].tolist())


def test_without_shuffling_every_epoch_is_in_order():
    plan = _plan(shuffle=False)
    assert _epoch(plan, 0).tolist() == _epoch(plan, 9).tolist() == list(range(100))


def test_a_short_last_batch_is_kept_or_left_out():
    assert [len(_plan(35).batch(0, step)) for step in range(3)] == [16, 16, 3]
    dropped = _plan(35, drop_last=True)
    assert dropped.steps_per_epoch == 2
    with pytest.raises(IndexError, match="step 2 of an epoch of 2 steps"):
        dropped.batch(0, 2)


def test_blocks_hold_neighbours():
    rows = np.array([5, 29, 0, 11, 12, 10, 3])
    assert [block.tolist() for block in blocks_of(rows, 10)] == [[0, 3, 5], [10, 11, 12], [29]]
    assert blocks_of(np.array([], np.int64), 10) == []


def test_shuffled_orders_are_uniform():
    """Each row is about equally often in each position of an epoch in one window."""
    plan = SamplePlan(blocks_of(np.arange(8), 2), 8, 5, shuffle=True)
    counts = np.zeros((8, 8))
    for epoch in range(4000):
        counts[np.arange(8), plan.batch(epoch, 0)] += 1
    chi_square = ((counts - 500) ** 2 / 500).sum()
    assert chi_square < 90  # 49 degrees of freedom: 99.95 %


def test_draws_are_uniform_and_independent_of_neighbours():
    u = np.stack([uniform(draw(0, Purpose.AUGMENT, 1, row, 8)) for row in range(4000)])
    assert abs(u.mean() - 0.5) < 0.01
    assert np.abs(np.corrcoef(u, rowvar=False) - np.eye(8)).max() < 0.08
    assert np.abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.06
    assert sorted(permutation(0, Purpose.BLOCKS, 0, 0, 50).tolist()) == list(range(50))


def test_a_rows_word_depends_on_seed_epoch_and_row_alone():
    words = row_words(1, 2, np.array([7, 3, 9]))
    assert words.dtype == np.uint64
    assert words[1] == row_words(1, 2, np.array([3]))[0]
    others = [row_words(2, 2, np.array([3])), row_words(1, 3, np.array([3]))]
    assert len({*words.tolist(), *(int(word[0]) for word in others)}) == 5
    assert len(row_words(1, 2, np.zeros(0, np.int64))) == 0


def test_split_evenly_covers():
    parts = [split_evenly(5, rank, 8) for rank in range(8)]
    assert [len(range(5)[part]) for part in parts] == [1] * 5 + [0] * 3


@settings(max_examples=40, deadline=None)
@given(
    paired=st.lists(st.booleans(), min_size=1, max_size=120),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_selected_rows(paired, fraction, seed):
    """n_paired + int(r * n_unpaired) unique rows; a smaller share is part of a larger one."""
    paired = np.array(paired)
    candidates = np.arange(len(paired)) * 3 + 7

    def select(share):
        return select_rows(candidates, paired, rows="partial", seed=seed, unpaired_fraction=share)

    chosen = select(fraction)
    assert len(np.unique(chosen)) == len(chosen)
    assert len(chosen) == paired.sum() + int(fraction * (~paired).sum())
    assert set(candidates[paired]) <= set(chosen)
    assert set(select(fraction / 2)) <= set(chosen)
    only = select_rows(candidates, paired, rows="paired", seed=seed)
    assert only.tolist() == candidates[paired].tolist() == select(0.0).tolist()


def test_with_replacement_repeats_unpaired_rows_only():
    paired = np.arange(400) < 100
    rows = select_rows(np.arange(400), paired, rows="partial", seed=0, with_replacement=True)
    values, counts = np.unique(rows, return_counts=True)
    assert len(rows) == 400
    assert (counts[values < 100] == 1).all()
    repeated = 300 - (values >= 100).sum()
    assert 85 < repeated < 135  # 300 / e = 110 rows are never drawn


def test_withheld_rows():
    assert int(withheld(0, 0, 0, 16, 0.3).sum()) == 4
    assert int(withheld(0, 0, 0, 10, 0.3).sum()) == 3
    assert not withheld(0, 0, 0, 16, 0.0).any()
    assert withheld(0, 0, 0, 16, 1.0).all()
    same = withheld(1, 2, 3, 16, 0.3)
    assert (same == withheld(1, 2, 3, 16, 0.3)).all()
    masks = np.stack([withheld(1, 2, step, 16, 0.3) for step in range(2000)])
    assert np.abs(masks.mean(0) - 0.25).max() < 0.05
