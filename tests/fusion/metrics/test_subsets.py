"""One set's scores, its subgroups, and paired differences."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from fusion.metrics.config import EvaluateConfig
from fusion.metrics.subsets import (
    age_band_members,
    paired_difference,
    score_set,
    score_subgroups,
)

CONFIG = EvaluateConfig(resamples=80)


def _data(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 2, (120, 4))
    return targets, np.clip(0.3 * targets + 0.6 * rng.random((120, 4)), 0, 1), np.arange(120) // 2


def test_a_set_holds_macro_micro_labels_types_and_calibration() -> None:
    targets, scores, subjects = _data()
    types = ("acute", "chronic", "acute", "mixed")
    found = score_set(targets, scores, subjects, config=CONFIG, label_types=types)
    assert (found["rows"], found["patients"], found["resampled_by"]) == (120, 60, "patient")
    assert found["positives"] == targets.sum(0).tolist()
    auprc = found["metrics"]["auprc"]
    each = [average_precision_score(targets[:, c], scores[:, c]) for c in range(4)]
    assert [one["value"] for one in auprc["labels"]] == pytest.approx(each)
    assert auprc["macro"]["value"] == pytest.approx(np.mean(each))
    assert auprc["types"]["acute"]["value"] == pytest.approx((each[0] + each[2]) / 2)
    assert list(auprc["types"]) == ["acute", "chronic", "mixed"]
    assert len(found["calibration"]["labels"]) == 4
    json.dumps(found, allow_nan=False)


def test_the_papers_interval_is_by_row_and_wider() -> None:
    targets, scores, subjects = _data()
    papers = EvaluateConfig(resamples=80, macro_interval="mean_of_labels")
    found = score_set(targets, scores, subjects, config=papers)
    auroc = found["metrics"]["auroc"]
    assert found["resampled_by"] == "row"
    assert auroc["macro"]["lower"] == pytest.approx(np.mean([x["lower"] for x in auroc["labels"]]))
    other = score_set(targets, scores, np.arange(120), config=CONFIG)["metrics"]["auroc"]["macro"]
    width = auroc["macro"]["upper"] - auroc["macro"]["lower"]
    assert width > other["upper"] - other["lower"]


def test_twice_the_same_and_another_seed_another_interval() -> None:
    targets, scores, subjects = _data()
    first = score_set(targets, scores, subjects, config=CONFIG)
    assert first == score_set(targets, scores, subjects, config=CONFIG)
    other = score_set(targets, scores, subjects, config=EvaluateConfig(resamples=80, seed=1))
    assert other["metrics"]["auroc"]["macro"] != first["metrics"]["auroc"]["macro"]


def test_subgroups_are_their_own_rows() -> None:
    targets, scores, subjects = _data()
    ages = np.array([17.0, 18.0, 39.9, 40.0, 60.0, 79.9, 80.0, 91.0, np.nan, 50.0] * 12)
    bands = age_band_members(ages)
    assert {name: int(member.sum()) for name, member in bands.items()} == {
        "[18, 40)": 24,
        "[40, 60)": 24,
        "[60, 80)": 24,
        "[80, +)": 24,
    }
    bands["none"] = np.zeros(120, bool)
    found = score_subgroups(targets, scores, subjects, bands, config=CONFIG)
    member = bands["[40, 60)"]
    expected = roc_auc_score(targets[member], scores[member])
    assert found["[40, 60)"]["metrics"]["auroc"]["macro"]["value"] == pytest.approx(expected)
    assert found["none"] == {"rows": 0, "patients": 0, "positives": [0] * 4, "metrics": None}


def test_differences_are_taken_resample_by_resample() -> None:
    targets, scores, subjects = _data()
    same = paired_difference(targets, scores, scores, subjects, config=CONFIG)
    assert same["auroc"]["macro"] == {"value": 0.0, "lower": 0.0, "upper": 0.0, "skipped": 0}
    rng = np.random.default_rng(1)
    worse = np.clip(scores + rng.normal(0, 0.1, scores.shape), 0, 1)
    found = paired_difference(targets, scores, worse, subjects, config=CONFIG)
    expected = roc_auc_score(targets, scores) - roc_auc_score(targets, worse)
    assert found["auroc"]["macro"]["value"] == pytest.approx(expected)
    width = found["auroc"]["macro"]["upper"] - found["auroc"]["macro"]["lower"]
    alone = score_set(targets, scores, subjects, config=CONFIG)["metrics"]["auroc"]["macro"]
    assert width < alone["upper"] - alone["lower"], "pairing cancels what both share"
    assert len(found["auprc"]["labels"]) == 4
