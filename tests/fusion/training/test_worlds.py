"""The same run on 1, 2 and 3 workers, with 1 and 3 micro-batches: the same losses.

17 rows in batches of 8 leave a last batch of one row: two of three workers have none. Images lie
in the first half of a batch, so with two workers one has no paired row.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

MODELS = {
    "medfuse": {"options": {"dropout": 0.0}, "optim": {"lr": 1e-3, "group_lr": {"cxr_encoder": 0}}},
    "drfuse": {"options": {"dropout": 0.0}, "optim": {"lr": 1e-3, "group_lr": {"cxr_encoder": 0}}},
}
GRID = [(1, 1), (2, 1), (3, 1), (1, 3), (2, 3)]


@pytest.fixture(scope="module")
def outcomes(harness, train_jobs, tmp_path_factory):
    """By name: <model>-<workers>-<micro-batches>, and the special ones."""
    root = tmp_path_factory.mktemp("worlds")
    chosen: dict[str, dict] = {}
    for world, parts in GRID:
        chosen[f"toy-{world}-{parts}"] = {"world": world, "train": {"accumulation": parts}}
        chosen[f"phased-{world}-{parts}"] = {
            "world": world,
            "train": {"accumulation": parts},
            "options": {"phased": True},
        }
        for model, block in MODELS.items():
            chosen[f"{model}-{world}-{parts}"] = {
                "model": model,
                "world": world,
                "train": {"accumulation": parts},
                **block,
            }
    chosen["local"] = {"world": 2, "local_census": True}
    chosen["poisoned"] = {"world": 2, "poison": 12}
    for world, images in (
        (1, (0, 1, 2, 3)),
        (2, (0, 1, 2, 3)),
        (1, (0, 1, 3, 4)),
        (3, (0, 1, 3, 4)),
    ):
        chosen[f"norm-{world}-{images}"] = {
            "world": world,
            "images": images,
            "rows": 16,
            "options": {"batch_norm": True},
            "train": {"batch_norm": "synchronised"},
        }
    jobs = [
        harness.Job(folder=str(root / name / "run"), out=str(root / name / "out"), **block)
        for name, block in chosen.items()
    ]
    return dict(zip(chosen, train_jobs(root, jobs), strict=True))


@pytest.mark.parametrize("model", ["toy", "phased", *MODELS])
@pytest.mark.parametrize(("world", "parts"), GRID[1:])
def test_losses_do_not_depend_on_workers_and_micro_batches(outcomes, model, world, parts):
    alone, several = outcomes[f"{model}-1-1"], outcomes[f"{model}-{world}-{parts}"]
    assert several.codes == [0] * world, several.stderr[-2000:]
    assert len(alone.curve()) == 6
    np.testing.assert_allclose(several.curve(), alone.curve(), atol=1e-5, rtol=0)
    np.testing.assert_allclose(several.scores(), alone.scores(), atol=1e-5)
    if model in ("toy", "phased"):
        for name, value in alone.weights[0].items():
            torch.testing.assert_close(several.weights[0][name], value, atol=1e-5, rtol=0)


@torch.no_grad()
def test_each_term_is_its_mean_over_the_rows_it_counts(outcomes, harness):
    """The first step's terms, row by row with the model as it was built."""
    job = harness.Job(folder="", out="", strategy="single")
    model = harness.session(job).strategy.model
    rows = harness.dataset(17)[:8]
    distances, losses = [], []
    for row in rows:
        output = model(harness.collate([row]))
        targets = torch.from_numpy(row["targets"])
        losses.append(
            torch.nn.functional.binary_cross_entropy_with_logits(output.logits[0], targets)
        )
        if row["has_cxr"] and row["has_ehr"]:
            distances.append(output.terms["distance"].sum)
    curve = outcomes["toy-3-1"]
    assert len(distances) == 3
    assert curve.curve("distance")[0] == pytest.approx(float(sum(distances)) / 3, abs=1e-6)
    assert curve.curve("task")[0] == pytest.approx(float(sum(losses)) / 8, abs=1e-6)


def test_the_comparison_notices_a_missing_reduction(outcomes):
    """Dividing by a worker's own rows changes the curve, so the test above can fail."""
    wrong = np.array(outcomes["local"].curve())
    right = np.array(outcomes["toy-1-1"].curve())
    assert np.abs(wrong - right).max() > 1e-2


def test_every_worker_ends_with_the_same_weights_and_decisions(outcomes):
    for name, outcome in outcomes.items():
        if name == "local":
            continue
        for weights, result in zip(outcome.weights, outcome.results, strict=True):
            assert result["progress"] == outcome.results[0]["progress"]
            for key, value in weights.items():
                if "norm" not in key and "running" not in key:
                    assert torch.equal(value, outcome.weights[0][key]), (name, key)


@pytest.mark.parametrize(("world", "images"), [(2, (0, 1, 2, 3)), (3, (0, 1, 3, 4))])
def test_synchronised_batch_norm_equals_one_worker(outcomes, world, images):
    """Also where one worker has no image: it joins with no rows."""
    alone, several = outcomes[f"norm-1-{images}"], outcomes[f"norm-{world}-{images}"]
    assert several.codes == [0] * world, several.stderr[-2000:]
    np.testing.assert_allclose(several.curve(), alone.curve(), atol=1e-5, rtol=0)
    for rank in range(world):
        for name, value in alone.weights[0].items():
            torch.testing.assert_close(several.weights[rank][name], value, atol=1e-4, rtol=0)


def test_a_loss_that_is_not_finite_stops_every_worker_before_the_update(outcomes, harness):
    outcome = outcomes["poisoned"]
    assert outcome.codes == [0, 0]
    for result in outcome.results:
        assert result["ending"] == "error"
        assert "epoch 0, step 1, rows [12, 13, 14, 15] of the shards" in result["error"]
        assert result["progress"]["updates"] == 1
    clean = outcomes["toy-2-1"]
    assert outcome.curve()[0] == clean.curve()[0]
    for weights in outcome.weights:
        assert all(torch.isfinite(value).all() for value in weights.values())
