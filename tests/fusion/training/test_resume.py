"""A run that was killed, stopped or moved goes on as if nothing had happened."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fusion.training import checkpoint

DROPOUT = {"dropout": 0.4, "batch_norm": True}


@pytest.fixture(scope="module")
def outcomes(harness, train_jobs, tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")

    def job(name, folder=None, **block):
        folder = root / (folder or name)
        block = {"options": DROPOUT, "world": 2, "every_steps": 2, **block}
        block["train"] = {"epochs": 3, **block.get("train", {})}
        return harness.Job(folder=str(folder), out=str(root / name / "out"), **block)

    plateau = {"schedule": "plateau", "plateau_patience": 0, "lr": 0.5}
    jobs = {
        "undisturbed": job("undisturbed", every_steps=None),
        "every-step": job("every-step", every_steps=1),
        "killed": job("killed", kill_rank=1, kill_at=5),
        "continued": job("continued", "killed"),
        "stopped": job("stopped", stop_at=4),
        "restarted": job("restarted", "stopped"),
        "straight": job("straight", stop_at=5, images=(0, 1, 4, 5)),
        "by-stages": job("by-stages", stop_at=4, images=(0, 1, 4, 5)),
        "by-stages-too": job("by-stages-too", "by-stages", stop_at=5, images=(0, 1, 4, 5)),
        "plain": job("plain", options={}, optim=plateau),
        "halted": job("halted", options={}, optim=plateau, stop_at=7),
        "moved-to-1": job("moved-to-1", "halted", options={}, optim=plateau, world=1),
        "halted-again": job("halted-again", options={}, optim=plateau, stop_at=5),
        "moved-to-3": job("moved-to-3", "halted-again", options={}, optim=plateau, world=3),
        "before": job("before", train={"evaluate": "before_epoch"}),
        "before-stopped": job("before-stopped", train={"evaluate": "before_epoch"}, stop_at=3),
        "before-restarted": job(
            "before-restarted", "before-stopped", train={"evaluate": "before_epoch"}
        ),
        "impatient": job("impatient", train={"epochs": 30, "patience": 2, "min_epochs": 4}),
        "timed": job("timed", every_steps=None, every_minutes=4.0, step_minutes=4.1),
        "again": job("again", "impatient", train={"epochs": 30, "patience": 2, "min_epochs": 4}),
    }
    ran = dict(zip(jobs, train_jobs(root, list(jobs.values())), strict=True))
    ran["root"] = root
    return ran


def assert_equal(ours, theirs):
    """Two mappings of tensors, to the bit."""
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def updates(outcome):
    """The updates at which worker 0 logged training, in order."""
    return [line["updates"] for line in outcome.results[0]["lines"] if line["kind"] == "train"]


@pytest.mark.parametrize(("first", "second"), [("killed", "continued"), ("stopped", "restarted")])
def test_the_continued_run_is_bit_equal_to_the_undisturbed_one(outcomes, first, second):
    undisturbed, continued = outcomes["undisturbed"], outcomes[second]
    if first == "killed":
        assert -9 in outcomes[first].codes
    else:
        assert outcomes[first].codes == [0, 0]
        assert outcomes[first].results[0]["ending"] == "interrupted"
    assert continued.codes == [0, 0], continued.stderr[-2000:]
    following = updates(continued)[0]
    # A kill may meet the checkpoint of step 4 on its way to the disk; then that of step 3 counts.
    assert following in ((4, 5) if first == "killed" else (5,)), "the very next step"
    assert continued.curve() == undisturbed.curve()[following - 1 :]
    assert continued.scores() == undisturbed.scores()[1:]
    for mine, theirs in zip(continued.weights, undisturbed.weights, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    best = [
        checkpoint.read_weights(outcomes["root"] / name / "best")[0]
        for name in (first, "undisturbed")
    ]
    assert_equal(*best)


def test_a_checkpoint_moves_nothing_in_training(outcomes):
    """Saved after every step: also each worker's own running statistics stay as they are."""
    saved, not_saved = outcomes["every-step"], outcomes["undisturbed"]
    assert saved.codes == [0, 0], saved.stderr[-2000:]
    assert saved.curve() == not_saved.curve()
    for ours, theirs in zip(saved.weights, not_saved.weights, strict=True):
        assert_equal(ours, theirs)


def test_each_worker_goes_on_with_its_own_running_statistics(outcomes):
    """Stopped within an epoch at step 4, gone on with to step 5; and straight to step 5."""
    folders = [
        outcomes["root"] / name / "checkpoints" / "step-00000005"
        for name in ("straight", "by-stages")
    ]
    assert outcomes["by-stages-too"].results[0]["lines"][0]["values"]["updates"] == 4
    own = [
        [load_file(folder / f"rank-000{rank}" / "worker.safetensors") for rank in range(2)]
        for folder in folders
    ]
    for rank in range(2):
        assert_equal(own[1][rank], own[0][rank])
    for name in ("random/cpu", "buffer/norm.running_mean"):
        assert not torch.equal(own[0][0][name], own[0][1][name]), "the workers' own do differ"
    whole = load_file(folders[0] / "rank-0000" / "weights.safetensors")
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(whole[name], own[0][0][f"buffer/{name}"]), "others get worker 0's"


@pytest.mark.parametrize(("name", "steps"), [("moved-to-1", 7), ("moved-to-3", 5)])
def test_a_run_continues_on_another_number_of_workers(outcomes, resume, name, steps):
    plain, moved = outcomes["plain"], outcomes[name]
    assert set(moved.codes) == {0}, moved.stderr[-2000:]
    assert updates(moved)[0] == steps + 1
    np.testing.assert_allclose(moved.curve(), plain.curve()[steps:], atol=1e-4)
    rates = [line["values"]["lr"] for line in plain.results[0]["lines"] if line["kind"] == "val"]
    moved_rates = [
        line["values"]["lr"] for line in moved.results[0]["lines"] if line["kind"] == "val"
    ]
    assert moved_rates == rates[-len(moved_rates) :]
    assert rates[-1] < 0.5, "the schedule did step"
    ran = {"moved-to-1": "halted", "moved-to-3": "halted-again"}[name]
    root = outcomes["root"]
    assert resume.position(root / ran) == resume.position(root / "plain")
    gap = resume.gap(root / ran, root / "plain")
    assert gap["weights"] < 1e-4
    assert gap["moments"] < 1e-4


def test_validating_before_each_epoch_leaves_the_last_unvalidated(outcomes):
    whole, restarted = outcomes["before"], outcomes["before-restarted"]
    kinds = [line["kind"] for line in whole.results[0]["lines"] if line["kind"] in ("train", "val")]
    assert kinds == ["val", *["train"] * 3] * 2, "epochs: 3 trains two"
    # Stopped before the first step of epoch 1, after its validation: it is not counted twice.
    assert restarted.results[0]["progress"] == whole.results[0]["progress"]
    assert restarted.curve() == whole.curve()[3:]


def test_patience_ends_the_run_alike_on_every_worker(outcomes):
    outcome = outcomes["impatient"]
    scores = outcome.scores()
    assert [result["ending"] for result in outcome.results] == ["patience", "patience"]
    best = int(np.argmax(scores))
    assert len(scores) == max(4, best + 1 + 2)
    assert outcome.results[0]["progress"]["best_epoch"] == best + 1
    assert outcome.results[0]["progress"] == outcome.results[1]["progress"]


def test_a_finished_run_takes_no_further_step(outcomes):
    again = outcomes["again"]
    assert again.results[0]["ending"] == "patience"
    assert again.curve() == []
    assert again.results[0]["progress"] == outcomes["impatient"].results[0]["progress"]


def test_a_checkpoint_is_written_when_the_last_one_is_old_enough(outcomes):
    """Three steps an epoch, each of 4.1 minutes: what is due is written after the step in hand."""
    outcome = outcomes["timed"]
    assert outcome.codes == [0, 0], outcome.stderr[-2000:]
    saved = [
        line["values"]["updates"]
        for line in outcome.results[0]["lines"]
        if line["values"].get("event") == "checkpoint"
    ]
    assert saved == [2, 3, 5, 6, 8, 9], "and at the end of each epoch"


def test_each_parameter_is_saved_once_by_its_owner(outcomes):
    folder = outcomes["root"] / "every-step" / "checkpoints"
    kept = sorted(path.name for path in folder.iterdir())
    assert kept == ["step-00000008", "step-00000009"], "num_to_keep: 2"
    meta = json.loads((folder / kept[-1] / "meta.json").read_text())
    assert meta["world"] == 2
    assert meta["progress"]["epoch"] == 3
    assert {name.split("/")[0] for name in meta["files"]} == {"rank-0000", "rank-0001"}
