"""AUROC and average precision against sklearn, with ties, weights and edge cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from fusion.metrics.ranking import RankedLabel, auroc, average_precision, macro


@pytest.mark.parametrize("decimals", [0, 1, 2, 12])
@pytest.mark.parametrize("rows", [2, 7, 400])
def test_equal_sklearn_with_and_without_ties(rows: int, decimals: int) -> None:
    rng = np.random.default_rng(rows + decimals)
    targets = rng.integers(0, 2, (rows, 6))
    targets[0], targets[1] = 0, 1
    scores = np.round(rng.random((rows, 6)), decimals)
    for c in range(6):
        expected = roc_auc_score(targets[:, c], scores[:, c])
        assert auroc(targets, scores)[c] == pytest.approx(expected, abs=1e-13)
        expected = average_precision_score(targets[:, c], scores[:, c])
        assert average_precision(targets, scores)[c] == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("decimals", [2, 3, 12])
def test_many_positives_are_summed_in_pieces(decimals: int) -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, 9000)
    scores = np.round(rng.random(9000) + 0.2 * targets, decimals)
    weights = rng.integers(0, 4, 9000)
    found = RankedLabel(targets, scores).scores(np.stack([np.ones(9000), weights], 1))
    repeated = np.repeat(np.arange(9000), weights)
    for column, rows in enumerate((slice(None), repeated)):
        expected = roc_auc_score(targets[rows], scores[rows])
        assert found[0][column] == pytest.approx(expected, abs=1e-12)
        expected = average_precision_score(targets[rows], scores[rows])
        assert found[1][column] == pytest.approx(expected, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=40
    )
)
def test_weights_are_repeated_rows(rows: list[tuple[bool, int, int]]) -> None:
    targets = np.array([int(row[0]) for row in rows])
    scores = np.array([float(row[1]) for row in rows])
    weights = np.array([row[2] for row in rows])
    repeated = np.repeat(np.arange(len(rows)), weights)
    found = RankedLabel(targets, scores).scores(weights[:, None].astype(np.float32))
    if len(set(targets[repeated])) < 2:
        assert np.isnan(found[0][0])
        assert np.isnan(found[1][0])
        return
    assert found[0][0] == pytest.approx(roc_auc_score(targets[repeated], scores[repeated]))
    assert found[1][0] == pytest.approx(
        average_precision_score(targets[repeated], scores[repeated])
    )


def test_groups_take_the_weight_of_their_column() -> None:
    targets, scores = np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.3, 0.1])
    by_group = RankedLabel(targets, scores, np.array([0, 0, 1, 1]), 2)
    by_row = RankedLabel(targets, scores)
    weights = np.array([[3.0, 1.0], [1.0, 2.0]])
    for one, other in zip(
        by_group.scores(weights), by_row.scores(weights[[0, 0, 1, 1]]), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_constant_score_is_chance() -> None:
    targets = np.array([[0], [1], [1], [0], [1]])
    constant = np.full((5, 1), 0.3)
    assert auroc(targets, constant)[0] == 0.5
    assert average_precision(targets, constant)[0] == 0.6


def test_the_order_of_rows_and_a_monotone_map_change_nothing() -> None:
    rng = np.random.default_rng(0)
    targets, scores = rng.integers(0, 2, (60, 3)), np.round(rng.random((60, 3)), 1)
    shuffled = rng.permutation(60)
    for metric in (auroc, average_precision):
        np.testing.assert_allclose(
            metric(targets, scores), metric(targets[shuffled], scores[shuffled]), rtol=1e-14
        )
        np.testing.assert_array_equal(metric(targets, scores), metric(targets, np.exp(5 * scores)))


def test_a_lacking_class_is_not_a_number_and_left_out_of_the_macro() -> None:
    targets = np.array([[0, 0, 1], [0, 1, 1]])
    scores = np.array([[0.1, 0.2, 0.5], [0.2, 0.7, 0.6]])
    found = auroc(targets, scores)
    np.testing.assert_array_equal(found, [np.nan, 1.0, np.nan])
    assert macro(found) == 1.0
    assert np.isnan(macro(found[:1]))


@pytest.mark.parametrize(
    ("targets", "scores", "message"),
    [
        ([[0], [2]], [[0.1], [0.2]], "0 or 1"),
        ([[0], [1]], [[0.1], [np.nan]], "finite"),
        ([0, 1], [0.1, 0.2], r"\[N, C\]"),
        ([[0], [1]], [[0.1]], r"\[N, C\]"),
    ],
)
def test_refuses_what_has_no_score(targets: list, scores: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auroc(np.array(targets), np.array(scores))
