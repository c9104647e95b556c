"""The signals planted in notes and labs: best scores known, simple probes blind, beliefs right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from data.sections import kept_text
from data.sources.synthetic import HospitalConfig, items
from data.sources.synthetic.clinical import (
    IN_LABS,
    IN_NOTES,
    NOISE_PAIR,
    admission_scores,
    draw_clinical,
    expected_labels,
    joint_beliefs,
    lab_beliefs,
    label_chances,
    note_beliefs,
    truth_rows,
)
from data.sources.synthetic.codes import draw_diagnoses
from data.sources.synthetic.labs import lab_rows
from data.sources.synthetic.notes import texts_of
from data.sources.synthetic.people import draw_block
from data.tasks import ELIXHAUSER_LABELS

CONFIG = HospitalConfig()
WITH_SIGNAL = {
    "Cardiac arrhythmias": "labs",
    "Fluid and electrolyte disorders": "shared",
    "Congestive heart failure": "both",
    "Chronic pulmonary disease": "notes",
    "Renal failure": "notes",
    "Valvular disease": "both",
}


@dataclass(frozen=True)
class Admissions:
    texts: list[str]
    labs: np.ndarray  # [A, n labs] mean of an admission's results
    latents: np.ndarray
    labels: np.ndarray
    notes: np.ndarray  # beliefs
    evidence: np.ndarray


@pytest.fixture(scope="module")
def admissions() -> Admissions:
    parts = []
    for number in range(75):
        rng = np.random.default_rng([21, number])
        block = draw_block(number, 21, CONFIG, rng)
        told = draw_clinical(block, CONFIG, rng)
        rows, evidence = lab_rows(block, rng, told.side, CONFIG, quirks=False)
        means = np.full((len(block.hadm), len(items.LABS)), np.nan)
        for k, item in enumerate(items.LABS):
            mine = rows.itemid == item.itemid
            at = block.stay_admission[rows.stay[mine]]
            total = np.bincount(at, rows.number[mine], len(means))
            count = np.bincount(at, minlength=len(means))
            means[count > 0, k] = total[count > 0] / count[count > 0]
        coded = draw_diagnoses(block, rng, told.extra, nine_only=True, quirks=False)
        texts = [kept_text(text) for text in texts_of(block, told, rng, brackets=True)]
        everyone = np.ones(len(block.hadm), bool)
        belief = note_beliefs(block, everyone)
        frame = truth_rows(block, coded, {"notes": belief}, everyone)
        labels = frame.select(f"label_{name}" for name in ELIXHAUSER_LABELS).to_numpy()
        parts.append((texts, means, block.latents, labels, belief, evidence))
    columns = list(zip(*parts, strict=True))
    return Admissions(
        [text for texts in columns[0] for text in texts], *(np.concatenate(c) for c in columns[1:])
    )


def probe(features: object, target: np.ndarray) -> float:
    """Held-out AUROC of a logistic regression, over two halves."""
    half = len(target) // 2
    found = []
    for fit, held in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        model = LogisticRegression(max_iter=300).fit(features[fit], target[fit])
        found.append(roc_auc_score(target[held], model.decision_function(features[held])))
    return float(np.mean(found))


def words(texts: list[str], grams: int = 1) -> object:
    return CountVectorizer(ngram_range=(1, grams), binary=False).fit_transform(texts)


def lab_features(means: np.ndarray) -> np.ndarray:
    centre, spread = np.nanmean(means, axis=0), np.nanstd(means, axis=0)
    return np.nan_to_num((means - centre) / spread, nan=0.0)


def best(admissions: Admissions, modality: str) -> np.ndarray:
    chances = label_chances(CONFIG, nine_share=1.0)
    labs = lab_beliefs(admissions.evidence, CONFIG)
    beliefs = {"notes": admissions.notes, "labs": labs}
    beliefs["both"] = joint_beliefs(admissions.notes, labs)
    return expected_labels(beliefs[modality], chances)


def test_bag_of_words_is_blind_to_order_and_negation(admissions):
    bag = words(admissions.texts)
    for latent in range(4):
        assert 0.45 <= probe(bag, admissions.latents[:, latent]) <= 0.55


def test_word_pairs_see_what_the_bag_does_not(admissions):
    pairs = words(admissions.texts, grams=3)
    for latent in IN_NOTES:
        assert probe(pairs, admissions.latents[:, latent]) >= 0.95


def test_lab_means_are_blind_and_their_products_are_not(admissions):
    means = lab_features(admissions.labs)
    index = {item.label: k for k, item in enumerate(items.LABS)}
    for latent, (one, other) in zip(
        IN_LABS, (("Sodium", "Potassium"), ("Hemoglobin", "White Blood Cells")), strict=True
    ):
        assert 0.45 <= probe(means, admissions.latents[:, latent]) <= 0.55
        product = means[:, [index[one]]] * means[:, [index[other]]]
        assert probe(product, admissions.latents[:, latent]) >= 0.9
    for latent in (2, 3):
        squares = np.concatenate([means, means**2], axis=1)
        assert 0.45 <= probe(squares, admissions.latents[:, latent]) <= 0.55


@pytest.mark.parametrize("label", ELIXHAUSER_LABELS)
def test_best_scores_of_each_label_and_the_probes_below_them(admissions, label):
    k = ELIXHAUSER_LABELS.index(label)
    truth = admissions.labels[:, k]
    score = {m: roc_auc_score(truth, best(admissions, m)[:, k]) for m in ("notes", "labs", "both")}
    bag = probe(words(admissions.texts), truth)
    means = probe(lab_features(admissions.labs), truth)
    kind = WITH_SIGNAL.get(label)
    if kind is None:
        assert max(score.values()) <= 0.57
        return
    assert max(bag, means) <= 0.58
    assert score["both"] >= max(bag, means) + 0.2
    if kind == "labs":
        assert score["labs"] >= 0.75
        assert score["notes"] <= score["labs"] - 0.1
    elif kind == "shared":
        assert min(score["notes"], score["labs"]) >= 0.8
        assert score["both"] <= max(score["notes"], score["labs"]) + 0.02
    elif kind == "notes":
        assert score["notes"] >= 0.8
        assert score["labs"] <= score["notes"] - 0.1
    else:
        assert score["both"] >= max(score["notes"], score["labs"]) + 0.08


def test_predicted_shares_are_those_that_occur(admissions):
    found = best(admissions, "both")
    for k in range(len(ELIXHAUSER_LABELS)):
        error = 4 * 0.5 / np.sqrt(len(found))
        assert abs(found[:, k].mean() - admissions.labels[:, k].mean()) < error
        sure = found[:, k] > np.quantile(found[:, k], 0.8)
        if sure.any():
            gap = found[sure, k].mean() - admissions.labels[sure, k].mean()
            assert abs(gap) < 4 * 0.5 / np.sqrt(sure.sum())


def test_coupled_noise_tells_one_test_of_the_other_and_nothing_else():
    config = HospitalConfig(renal_coupling=0.8)
    one, other = ([i.label for i in items.LABS].index(name) for name in NOISE_PAIR)
    free, tied, latents = [], [], []
    for number in range(40):
        block = draw_block(number, 5, CONFIG, np.random.default_rng([5, number]))
        told = [
            draw_clinical(block, c, np.random.default_rng([6, number])) for c in (CONFIG, config)
        ]
        assert np.array_equal(told[0].extra, told[1].extra)
        assert np.array_equal(told[0].noise, told[1].noise)
        assert np.array_equal(*(np.delete(each.side, other, axis=1) for each in told))
        free.append(told[0].side)
        tied.append(told[1].side)
        latents.append(block.latents)
    free, tied, latents = (np.concatenate(part) for part in (free, tied, latents))
    error = 4 * 0.5 / np.sqrt(len(tied))
    assert abs((free[:, one] == free[:, other]).mean() - 0.5) < error
    assert abs((tied[:, one] == tied[:, other]).mean() - 0.9) < error
    for k in range(4):
        assert abs((tied[:, other] == 1)[latents[:, k] == 1].mean() - 0.5) < 2 * error


def test_lab_beliefs_are_calibrated_when_the_shift_is_faint():
    faint = HospitalConfig(lab_shift=0.3)
    belief, on = [], []
    for number in range(60):
        rng = np.random.default_rng([8, number])
        block = draw_block(number, 8, faint, rng)
        told = draw_clinical(block, faint, rng)
        _, evidence = lab_rows(block, rng, told.side, faint, quirks=False)
        belief.append(lab_beliefs(evidence, faint)[:, list(IN_LABS)])
        on.append(block.latents[:, list(IN_LABS)])
    belief, on = np.concatenate(belief).ravel(), np.concatenate(on).ravel()
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = (belief >= low) & (belief < low + 0.2)
        assert inside.sum() > 100
        gap = belief[inside].mean() - on[inside].mean()
        assert abs(gap) < 4 * 0.5 / np.sqrt(inside.sum())


def test_a_written_hospital_keeps_its_admissions_truth(iii_hospital):
    out = iii_hospital.truth.parent
    scores = admission_scores(out)
    assert scores["label"].to_list() == list(ELIXHAUSER_LABELS)
    frame = pl.read_parquet(out / "truth" / "admissions.parquet")
    assert frame["hadm_id"].n_unique() == frame.height
    assert 0.7 < frame["noted"].mean() < 1.0
    copd = scores.filter(pl.col("label") == "Chronic pulmonary disease").row(0, named=True)
    assert copd["oracle"] + 0.03 >= copd["notes"] > 0.7
    assert copd["labs"] <= 0.65
    few = admission_scores(out, hadm_ids=frame["hadm_id"].head(60).to_list())
    assert few["positives"].sum() < scores["positives"].sum()
