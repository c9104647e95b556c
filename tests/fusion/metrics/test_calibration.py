"""Calibration against sklearn's unpenalised logistic regression and written-out sums."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from fusion.metrics.calibration import calibration, expected_calibration_error, recalibration


def _sample(slope: float, intercept: float, rows: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities whose truth is logit = intercept + slope * their logit."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 1.5, rows)
    truth = 1 / (1 + np.exp(-(intercept + slope * logits)))
    return (rng.random(rows) < truth).astype(float), 1 / (1 + np.exp(-logits))


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.5, -1.0), (2.0, 0.7), (-0.4, 0.0)])
def test_recalibration_is_the_maximum_likelihood_fit(slope: float, intercept: float) -> None:
    y, p = _sample(slope, intercept)
    found = recalibration(y, p)
    logits = np.log(p / (1 - p))[:, None]
    reference = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logits, y)
    assert found == pytest.approx((reference.intercept_[0], reference.coef_[0, 0]), abs=1e-5)
    assert found == pytest.approx((intercept, slope), abs=0.15)


def test_recalibration_survives_probabilities_of_zero_and_one() -> None:
    y = np.array([0, 1, 0, 1, 1, 0, 0, 1.0])
    p = np.array([0.0, 1.0, 0.2, 0.9, 0.1, 0.8, 0.3, 0.6])
    intercept, slope = recalibration(y, p)
    assert np.isfinite([intercept, slope]).all()


def test_no_fit_where_none_exists() -> None:
    y = np.array([0, 0, 1, 1.0])
    assert recalibration(y, np.array([0.1, 0.2, 0.8, 0.9])) is None
    assert recalibration(y, np.full(4, 0.5)) is None
    assert recalibration(np.zeros(4), np.array([0.1, 0.2, 0.8, 0.9])) is None


def test_error_and_curve_by_hand() -> None:
    y = np.array([0, 1, 1, 0, 1.0])
    p = np.array([0.05, 0.15, 0.55, 0.45, 1.0])
    # Bins of width 1/2: three rows below (predicted .2167, observed 1/3), two above (.775, 1).
    below, above = abs(0.65 / 3 - 1 / 3), abs(1.55 / 2 - 1)
    assert expected_calibration_error(y, p, 2) == pytest.approx(0.6 * below + 0.4 * above)
    curve = calibration(y, p, 2)["curve"]
    assert [point["rows"] for point in curve] == [3, 2]
    assert [point["positives"] for point in curve] == [1, 2]
    assert curve[1]["observed"] == 1.0
    assert curve[0]["predicted"] == pytest.approx(0.65 / 3)


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_a_slope_below_one() -> None:
    fair = calibration(*_sample(1.0, 0.0))
    bold = calibration(*_sample(0.5, 0.0))
    assert fair["ece"] < 0.03 < bold["ece"]
    assert bold["slope"] == pytest.approx(0.5, abs=0.06)
    assert sum(point["rows"] for point in fair["curve"]) == 4000
