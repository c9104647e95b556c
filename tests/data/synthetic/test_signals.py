"""The planted signals: known best scores, blind simple probes, exact beliefs."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data.sources.synthetic import HospitalConfig
from data.sources.synthetic.images import draw_images, shapes
from data.sources.synthetic.planting import PLANTED, bayes, oracle
from data.sources.synthetic.truth import auroc

CONFIG = HospitalConfig()


def probe(features: np.ndarray, target: np.ndarray) -> float:
    """Held-out AUROC of a logistic regression, over two halves."""
    half = len(target) // 2
    scores = np.empty(len(target))
    for fit, held in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        scores[held] = model.fit(features[fit], target[fit]).decision_function(features[held])
    return 0.5 * (
        roc_auc_score(target[:half], scores[:half]) + roc_auc_score(target[half:], scores[half:])
    )


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    latents = rng.integers(0, 2, (3000, 2)).astype(np.uint8)
    images, _ = draw_images(latents, CONFIG, rng, judged=False)
    _, belief = draw_images(latents[:300], CONFIG, rng)
    return latents, images, belief


def means_and_lasts(values: np.ndarray) -> np.ndarray:
    seen = ~np.isnan(values)
    mean = np.nansum(values, axis=1) / np.maximum(seen.sum(1), 1)
    final = values.shape[1] - 1 - np.argmax(seen[:, ::-1], axis=1)
    last = np.take_along_axis(values, final[:, None], axis=1)[:, 0]
    return np.nan_to_num(np.concatenate([mean, last], axis=1), nan=0.0)


def test_means_and_last_values_say_nothing_of_temporal_labels(drawn):
    features = means_and_lasts(drawn.values)
    for latent in range(2):
        figure = probe(features, drawn.latents[:, latent])
        assert 0.45 <= figure <= 0.55
    for k, label in enumerate(PLANTED):
        if label.kind == "ehr":
            assert probe(features, drawn.labels[:, k]) <= 0.55, label.name


def test_the_probe_finds_a_signal_that_lies_in_the_means(drawn):
    values = drawn.values.copy()
    values[drawn.latents[:, 0] == 1, :, 0] += 8.0
    assert probe(means_and_lasts(values), drawn.latents[:, 0]) >= 0.65


def test_image_mean_and_spread_say_nothing_of_image_labels(pictures):
    latents, images, _ = pictures
    features = np.stack([images.mean((1, 2)), images.std((1, 2))], axis=1)
    for latent in range(2):
        assert 0.45 <= probe(features, latents[:, latent]) <= 0.55


def test_shapes_of_a_pair_share_mean_and_energy():
    patches = shapes(CONFIG)
    assert np.allclose(patches.mean((-1, -2)), 0.0, atol=1e-12)
    energy = (patches**2).sum((-1, -2))
    assert np.allclose(energy, energy.flat[0])


def test_beliefs_are_right_and_nearly_sure_where_the_motif_is_shown(drawn, pictures):
    shown = drawn.hours >= 14.0
    for latent in range(2):
        truth, belief = drawn.latents[:, latent], drawn.beliefs[:, latent]
        assert roc_auc_score(truth[shown], belief[shown]) >= 0.995
        assert np.all(belief[drawn.hours < 12.0] == 0.5)
    latents, _, belief = pictures
    assert all(roc_auc_score(latents[:300, k], belief[:, k]) >= 0.995 for k in range(2))


def test_beliefs_are_calibrated_when_the_motif_is_faint():
    """With a faint motif the exact posterior is unsure, and is right as often as it says."""
    from data.sources.synthetic.people import draw_block
    from data.sources.synthetic.vitals import beliefs, draw_course

    faint = HospitalConfig(
        leading=({"Heart Rate": 3.0, "Temperature": 0.1}, CONFIG.leading[1]),
        following=({"Respiratory rate": 1.0, "Glucose": 7.0}, CONFIG.following[1]),
    )
    found, truth = [], []
    for number in range(100):
        rng = np.random.default_rng([5, number])
        block = draw_block(number, 5, faint, rng)
        found.append(beliefs(block, draw_course(block, faint, rng), faint)[:, 0])
        truth.append(block.latents[block.stay_admission, 0])
    belief, on = np.concatenate(found), np.concatenate(truth)
    assert np.mean((belief > 0.2) & (belief < 0.8)) > 0.15
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = (belief >= low) & (belief < low + 0.2) & (belief != 0.5)
        error = 4.0 * 0.5 / np.sqrt(inside.sum())
        assert abs(on[inside].mean() - belief[inside].mean()) < error


def test_image_beliefs_are_calibrated_when_the_shape_is_faint():
    faint = HospitalConfig(patch_amplitude=0.03)
    rng = np.random.default_rng(8)
    on = rng.integers(0, 2, (800, 2)).astype(np.uint8)
    _, belief = draw_images(on, faint, rng)
    for latent in range(2):
        unsure = (belief[:, latent] > 0.1) & (belief[:, latent] < 0.9)
        assert unsure.sum() > 80
        for low, high in ((0.1, 0.35), (0.35, 0.65), (0.65, 0.9)):
            inside = (belief[:, latent] >= low) & (belief[:, latent] < high)
            gap = on[inside, latent].mean() - belief[inside, latent].mean()
            assert abs(gap) < 4.0 * 0.5 / np.sqrt(inside.sum())


@pytest.fixture(scope="module")
def scores() -> dict[str, np.ndarray]:
    """Labels and scores of 200,000 admissions that are seen perfectly."""
    rng = np.random.default_rng(2)
    latents = rng.integers(0, 2, (200_000, 4)).astype(np.uint8)
    both = oracle(latents, CONFIG)
    sure = latents.astype(np.float64)
    ehr, cxr = sure.copy(), sure.copy()
    ehr[:, 2:], cxr[:, :2] = 0.5, 0.5
    labels = (rng.random(both.shape) < both).astype(np.uint8)
    return {
        "labels": labels,
        "oracle": both,
        "ehr": bayes(ehr, CONFIG),
        "cxr": bayes(cxr, CONFIG),
    }


@pytest.mark.parametrize("column", range(len(PLANTED)), ids=[p.name[:20] for p in PLANTED])
def test_best_scores_of_each_kind(scores, column):
    truth = scores["labels"][:, column]
    joint, ehr, cxr = (auroc(truth, scores[n][:, column]) for n in ("oracle", "ehr", "cxr"))
    late = auroc(truth, (scores["ehr"][:, column] + scores["cxr"][:, column]).round(9))
    kind = PLANTED[column].kind
    if kind == "ehr":
        assert joint == pytest.approx(ehr)
        assert joint > 0.8
        assert cxr == 0.5
    elif kind == "cxr":
        assert joint == pytest.approx(cxr)
        assert joint > 0.8
        assert ehr == 0.5
    elif kind == "both":
        assert joint > max(ehr, cxr) + 0.08
        assert min(ehr, cxr) > 0.65
    elif kind == "xor":
        assert joint > 0.85
        assert max(ehr, cxr, late) <= 0.55
    else:
        assert joint == ehr == cxr == 0.5


def test_auroc_matches_sklearn_with_ties():
    rng = np.random.default_rng(0)
    truth, score = rng.integers(0, 2, 300), rng.integers(0, 6, 300)
    assert auroc(truth, score) == pytest.approx(roc_auc_score(truth, score))
