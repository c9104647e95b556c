"""Planted optima, found by the search's own code: study, sampler, journal, drive."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

_PATH = Path(__file__).parents[3] / "benchmarks" / "tune.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_tune", _PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_known_penalty_of_a_ridge_regression_is_found(bench, tmp_path):
    """sigma^2 / tau^2 = 36, within a fifth of a decade of a range of six; regret below 0.1 %."""
    task = bench.Ridge()
    assert task.error(36.0) < min(task.error(36.0 * 4), task.error(36.0 / 4))
    found = bench.ridge(40, tmp_path)
    assert found["known_best"] == 36.0
    assert found["decades_off"] < 0.2
    assert found["regret_share"] < 1e-3


def test_the_ridge_is_the_one_of_the_normal_equations(bench):
    """Against gradient descent on the penalised squared error, written out."""
    gram, moment, x, y = bench.Ridge()._draws[0]
    weights = np.zeros(bench.WIDTH)
    rate = 1 / (np.linalg.eigvalsh(gram).max() + 36.0)
    for _ in range(3000):
        weights -= rate * (gram @ weights - moment + 36.0 * weights)
    slow = ((y - x @ weights) ** 2).mean()
    exact = np.linalg.solve(gram + 36.0 * np.eye(bench.WIDTH), moment)
    assert slow == pytest.approx(((y - x @ exact) ** 2).mean(), rel=1e-9)


@pytest.mark.slow
def test_samplers_are_compared_seed_by_seed_and_the_same_twice(bench, tmp_path):
    least = bench.hartmann(dict(zip(bench.SIX, bench.HARTMANN_AT, strict=True)))
    assert least == pytest.approx(bench.LEAST, abs=1e-4)
    runs = [bench.samplers(2, 12, tmp_path / str(number)) for number in range(2)]
    assert runs[0] == runs[1]
    assert min(runs[0]["mean_regret"].values()) > 0
    # Twelve trials, ten of them random: two proposals of TPE's model may tell the samplers apart.
    assert runs[0]["seeds"] == 2
