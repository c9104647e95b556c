"""The best guess of a value by another one, and its error."""

from __future__ import annotations

import numpy as np
import pytest

from fusion.metrics.imputation import binned_mean, root_mean_squared_error


def test_the_best_guess_is_the_conditional_mean():
    rng = np.random.default_rng(4)
    x = rng.normal(size=20_000)
    y = np.tanh(3 * x) + rng.normal(size=len(x))
    at = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert binned_mean(x, y, at) == pytest.approx(np.tanh(3 * at), abs=0.15)
    held = rng.normal(size=20_000)
    truth = np.tanh(3 * held) + rng.normal(size=len(held))
    some = held > -1
    error = root_mean_squared_error(binned_mean(x, y, held), truth, some)
    assert error == pytest.approx(1.0, abs=0.02)
    assert root_mean_squared_error(np.array([2.0]), np.zeros((2, 1)), np.ones((2, 1), bool)) == 2
