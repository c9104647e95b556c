"""The same run under every strategy: the same losses, weights and moments.

17 rows in batches of 8 leave a last batch of one row, which most workers have no part of. Images
lie in the first half of a batch, so that shares differ in their paired rows and one has none. The
rate halves within the run.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fusion import registry

ZERO = ("zero1", "zero2", "zero3")
PLATEAU = {"schedule": "plateau", "plateau_patience": 0}
PHASED = {
    "options": {"phased": True},
    "train": {"epochs": 3, "accumulation": 3},
    "optim": {"lr": 0.1, "clip_norm": 0.5, "weight_decay": 0.01, "name": "adamw", **PLATEAU},
}
DRFUSE = {
    "model": "drfuse",
    "options": {"dropout": 0.0},
    "train": {"epochs": 3, "batch_norm": "synchronised"},
    # With few images batch norm amplifies rounding, and a higher rate that once more.
    "optim": {"lr": 1e-3, **PLATEAU},
}
MEDFUSE = {**DRFUSE, "model": "medfuse"}
# Masked values are counted over all workers and micro-batches, and masks are the rows' own.
MLTM = {
    **DRFUSE,
    "model": "mltm",
    "options": {"mask_ratio": 0.5},
    "train": {"epochs": 3, "selection_metric": "masked"},
    "optim": {"lr": 1e-2, **PLATEAU},
}
MMTM = {**DRFUSE, "model": "mmtm", "optim": {"lr": 1e-4, **PLATEAU}}
FROZEN = {
    **DRFUSE,
    "optim": {"lr": 1e-3, "group_lr": {"cxr_encoder": 0, "ehr_encoder": 1e-4}, **PLATEAU},
}


def on(strategy, world=1, block=PHASED, **more):
    merged = {**block, "strategy": strategy, "world": world, **more}
    return {**merged, "train": {**block["train"], **more.get("train", {})}}


FAST = {
    "single": on("single"),
    "ddp-2": on("ddp", 2),
    "zero1-2": on("zero1", 2),
    "zero2-3": on("zero2", 3),
    "zero3-2": on("zero3", 2),
    "zero2-2-optimizer": on("zero2", 2, offload="optimizer"),
    "zero3-2-all": on("zero3", 2, offload="all"),
    "mltm-single": on("single", block=MLTM),
    "mltm-ddp-2": on("ddp", 2, MLTM, train={"accumulation": 2}),
    "drfuse-single": on("single", block=DRFUSE),
    "drfuse-zero3-2": on("zero3", 2, DRFUSE, train={"recompute": True}),
    **{f"deaf-{name}": on(name, 2, deaf=True) for name in ("ddp", "zero2", "zero3")},
}


@pytest.fixture(scope="module")
def run_all(harness, train_jobs, tmp_path_factory):
    """A function from named blocks to named outcomes; `folder` makes two jobs one run."""

    def run(blocks):
        root = tmp_path_factory.mktemp("strategies")
        jobs = [
            harness.Job(
                folder=str(root / block.get("folder", name) / "run"),
                out=str(root / name / "out"),
                **{key: value for key, value in block.items() if key != "folder"},
            )
            for name, block in blocks.items()
        ]
        return dict(zip(blocks, train_jobs(root, jobs), strict=True))

    return run


@pytest.fixture(scope="module")
def outcomes(run_all):
    return run_all(FAST)


def assert_same(several, alone, atol=1e-5):
    """Losses, scores, rates, and weights where their gradients are more than rounding.

    A bias before a softmax or a batch norm has no gradient but rounding, which Adam amplifies.
    """
    assert several.codes == [0] * several.job.world, several.stderr[-3000:]
    assert len(alone.curve()) == 3 * several.job.train["epochs"]
    np.testing.assert_allclose(several.curve(), alone.curve(), atol=atol, rtol=0)
    np.testing.assert_allclose(several.scores(), alone.scores(), atol=atol)
    assert rates(several) == rates(alone)
    squares = {key: value for key, value in moments(alone).items() if key.startswith("exp_avg_sq")}
    for name, value in alone.weights[0].items():
        moved = [square.sqrt() for key, square in squares.items() if key.split("/")[2] == name]
        real = sum(moved) > 1e-4 if moved else torch.ones_like(value, dtype=torch.bool)
        for weights in several.weights:
            torch.testing.assert_close(weights[name][real], value[real], atol=20 * atol, rtol=1e-4)


def test_nothing_is_compiled(outcomes):
    extensions = Path(outcomes["zero2-3"].job.out).parents[1] / "extensions"
    assert not list(extensions.rglob("*"))


def rates(outcome):
    return [line["values"]["lr"] for line in outcome.results[0]["lines"] if line["kind"] == "val"]


@pytest.mark.parametrize("name", [name for name in FAST if "single" not in name and "-" in name])
def test_a_strategy_trains_as_one_worker_does(outcomes, name):
    model = name.split("-")[0]
    alone = outcomes[f"{model}-single" if model in ("drfuse", "mltm") else "single"]
    assert len(set(rates(alone))) > 1, "the rate never fell"
    if not name.startswith("deaf"):
        assert_same(outcomes[name], alone)
        return
    # Without the reduction the curves part, so the comparison can fail.
    assert outcomes[name].codes == [0, 0], outcomes[name].stderr[-3000:]
    apart = np.abs(np.array(outcomes[name].curve()) - np.array(alone.curve())).max()
    assert apart > 1e-3


MODELS = {"medfuse": MEDFUSE, "drfuse": DRFUSE, "mmtm": MMTM, "mltm": MLTM}
FEATURES = {
    "accumulation": {**FROZEN, "train": {"epochs": 3, "accumulation": 3}},
    "clipping": {**FROZEN, "optim": {**FROZEN["optim"], "clip_norm": 0.05}},
    "recompute": {**MEDFUSE, "train": {**MEDFUSE["train"], "recompute": True}},
    "frozen": FROZEN,
}
GRID = [(name, world) for name in ("ddp", *ZERO) for world in (1, 2, 3)]
# All pairs of strategies and workers: test_resume_matrix.py. These have several phases.
RESUMED = {("zero2", 2): ("zero3", 3), ("zero3", 2): ("single", 1)}


@pytest.fixture(scope="module")
def matrix(run_all):
    blocks = {}
    for model, block in MODELS.items():
        blocks[f"{model}-single"] = on("single", block=block)
        grid = GRID if model not in ("mmtm", "mltm") else [("zero1", 2), ("zero2", 3), ("zero3", 2)]
        blocks |= {f"{model}-{name}-{world}": on(name, world, block) for name, world in grid}
    for feature, block in FEATURES.items():
        blocks[f"{feature}-single"] = on("single", block=block)
        blocks |= {f"{feature}-{name}-2": on(name, 2, block) for name in ZERO}
    blocks["whole-single"] = on("single")
    # DeepSpeed's default: parameters as small as these are not sharded.
    blocks["whole-zero3-2"] = on("zero3", 2, whole_elements=100_000)
    return run_all(blocks)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["medfuse", "drfuse"])
@pytest.mark.parametrize(("strategy", "world"), GRID)
def test_models_train_alike_under_every_strategy(matrix, model, strategy, world):
    assert_same(matrix[f"{model}-{strategy}-{world}"], matrix[f"{model}-single"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mmtm-zero1-2", "mmtm-zero2-3", "mmtm-zero3-2"])
def test_phases_that_share_parameters_train_alike(matrix, name):
    assert_same(matrix[name], matrix["mmtm-single"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mltm-zero1-2", "mltm-zero2-3", "mltm-zero3-2"])
def test_a_loss_over_values_trains_alike(matrix, name):
    assert_same(matrix[name], matrix["mltm-single"])


@pytest.mark.slow
def test_zero3_with_parameters_that_stay_whole(matrix):
    assert_same(matrix["whole-zero3-2"], matrix["whole-single"])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ZERO)
@pytest.mark.parametrize("feature", FEATURES)
def test_features_work_under_every_strategy(matrix, feature, strategy):
    assert_same(matrix[f"{feature}-{strategy}-2"], matrix[f"{feature}-single"])


@pytest.mark.slow
def test_bfloat16_trains_alike(run_all):
    block = {**FROZEN, "train": {"epochs": 2, "precision": "bf16", "recompute": True}}
    outcomes = run_all({name: on(name, 2, block) for name in ("ddp", *ZERO)})
    full = run_all({"full": on("ddp", 2, {**block, "train": {"epochs": 2}})})["full"]
    for name in ZERO:
        assert_same(outcomes[name], outcomes["ddp"], atol=5e-3)
    assert outcomes["ddp"].curve() != full.curve()


@pytest.mark.slow
def test_every_model_trains_under_zero3_where_one_worker_has_no_image(run_all):
    blocks = {}
    for name in registry.names():
        options = {"dropout": 0.0} if "dropout" in registry.get(name).Config.model_fields else {}
        block = {**DRFUSE, "model": name, "options": options, "optim": {"lr": 1e-3}}
        block["train"] = {"epochs": 1, "batch_norm": "synchronised"}
        blocks |= {f"{name}-1": on("single", 1, block), f"{name}-2": on("zero3", 2, block)}
    outcomes = run_all(blocks)
    assert len(outcomes) >= 20
    for name in registry.names():
        assert_same(outcomes[f"{name}-2"], outcomes[f"{name}-1"])


@pytest.fixture(scope="module")
def resumed(run_all):
    blocks = {"undisturbed": on("single")}
    for first, second in RESUMED.items():
        folder = "-".join(map(str, first))
        blocks[folder] = on(*first, stop_at=4)
        blocks[f"{folder}-resumed"] = on(*second, folder=folder)
    return run_all(blocks)


@pytest.mark.slow
@pytest.mark.parametrize("first", RESUMED, ids=lambda first: "-".join(map(str, first)))
def test_a_run_goes_on_under_another_strategy(resumed, first):
    """Stopped in its second epoch: the rest of the curve, weights and moments are the run's."""
    folder = "-".join(map(str, first))
    undisturbed, before, after = (
        resumed[name] for name in ("undisturbed", folder, f"{folder}-resumed")
    )
    assert before.results[0]["ending"] == "interrupted"
    assert before.codes + after.codes == [0] * (before.job.world + after.job.world)
    curve = before.curve() + after.curve()
    np.testing.assert_allclose(curve, undisturbed.curve(), atol=1e-5, rtol=0)
    for name, value in undisturbed.weights[0].items():
        torch.testing.assert_close(after.weights[0][name], value, atol=1e-5, rtol=0)
    theirs, own = (moments(outcome) for outcome in (undisturbed, after))
    assert theirs.keys() == own.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(own[key], value, atol=1e-5, rtol=0)


def moments(outcome):
    newest = max((Path(outcome.job.folder) / "checkpoints").glob("step-*"))
    parts = [load_file(path) for path in newest.glob("rank-*/moments.safetensors")]
    return {key: value for part in parts for key, value in part.items()}
