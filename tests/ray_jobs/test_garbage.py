"""`rayfuse runs gc` frees what is not needed and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from data.errors import InputError
from fusion.training import loop
from fusion.training.checkpoint import candidates, newest_complete, read_weights
from fusion.training.strategy import Single
from ray_jobs import config as run_config
from ray_jobs import garbage, session
from ray_jobs.cli import app
from ray_jobs.config import RunConfig
from ray_jobs.runs import RunFolder

ROOT = Path(__file__).parents[2]
KEPT = 4


@pytest.fixture
def run(make_shards, tmp_path):
    """A run with four whole checkpoints, trained to its end."""
    make_shards(tmp_path / "shards", rows=40, image_size=32, hours=48)
    config = RunConfig.model_validate(
        {
            "name": "one",
            "runs_dir": tmp_path / "runs",
            "task": "mortality",
            "model": {"name": "lstm", "hidden": 4},
            "data": {
                "shards": tmp_path / "shards",
                "batches": {"image": {"resize": 32, "size": 32}, "cache_dir": tmp_path / "cache"},
            },
            "train": {"epochs": 2, "batch_size": 12},
            "checkpoint": {"every_steps": 1, "num_to_keep": KEPT},
            "scaling": {"strategy": "single"},
        }
    )
    folder = RunFolder(config.folder)
    folder.path.mkdir(parents=True)
    run_config.dump(config, folder.config)
    torch.set_num_threads(1)
    made = session.open_session(config, folder, Single(torch.device("cpu")), ".stop")
    loop.fit(made)
    made.log.close()
    assert len(candidates(folder.checkpoints)) == KEPT
    return folder


def names(run):
    return [path.name for path in candidates(run.checkpoints)]


def everything(run):
    return sorted(path for path in run.path.rglob("*"))


def damage(run):
    """Tears the newest checkpoint, alters the one before; makes leftovers."""
    newest, before = list(reversed(candidates(run.checkpoints)))[:2]
    (newest / "COMPLETE").unlink()
    part = next(before.rglob("weights.safetensors"))
    part.write_bytes(part.read_bytes()[:-1])
    (run.path / ".ray" / "start-1").mkdir(parents=True)
    (run.path / ".ray" / "start-1" / "state").write_bytes(b"x" * 1000)
    (run.path / "best" / ".meta.json.0123abcd.partial").touch()
    (run.path / ".stop").touch()
    return newest, before


def test_a_finished_run_keeps_what_it_asks_for_and_its_best(run):
    run.outcome.write_text("{}")
    before, best = names(run), read_weights(run.best)[0]
    assert garbage.collect(run.path) == [], "nothing is beyond num_to_keep"
    removed = garbage.collect(run.path, keep=1)
    assert [one.path.name for one in removed] == list(reversed(before[:-1]))
    assert names(run) == before[-1:]
    garbage.collect(run.path, keep=0)
    assert names(run) == []
    assert all(torch.equal(value, best[name]) for name, value in read_weights(run.best)[0].items())


def test_an_unfinished_run_keeps_its_newest_whole_checkpoint(run):
    before = names(run)
    newest, altered = damage(run)
    removed = garbage.collect(run.path.parent, keep=0)
    gone = {one.path for one in removed}
    assert {newest, altered, run.path / ".ray", run.path / ".stop"} <= gone
    assert names(run) == before[1:2]
    assert newest_complete(run.checkpoints).path == run.checkpoints / before[1]
    assert not list(run.path.rglob("*.partial"))
    assert all(not one.path.exists() for one in removed)
    assert garbage.collect(run.path, keep=0) == []


def test_a_dry_run_says_it_all_and_touches_nothing(run):
    damage(run)
    before = everything(run)
    planned = garbage.collect(run.path, keep=1, dry_run=True)
    assert everything(run) == before
    done = garbage.collect(run.path, keep=1)
    assert planned == done
    sizes = sum(one.size for one in done)
    assert sizes > 1000
    assert garbage.report(done, dry_run=False).splitlines()[-1] == (
        f"removed {len(done)} item(s), {sizes / 1e6:.2f} MB"
    )
    text = garbage.report(planned, dry_run=True)
    assert "torn checkpoint (no COMPLETE" in text
    assert "was altered)" in text
    assert text.splitlines()[-1].startswith("would remove")


def test_a_checkpoint_of_another_version_is_not_torn(run):
    import json

    from data.files import sha256_file

    newest = candidates(run.checkpoints)[-1]
    meta = json.loads((newest / "meta.json").read_text())
    (newest / "meta.json").write_text(json.dumps({**meta, "format": 99}))
    (newest / "COMPLETE").write_text(sha256_file(newest / "meta.json") + "\n")
    garbage.collect(run.path, keep=1)
    assert newest.name in names(run)


HOLD = """
import sys, time
from pathlib import Path
from ray_jobs.lineage import locked
from ray_jobs.runs import RunFolder
with locked(RunFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_run_that_is_being_trained_is_left_alone(run, dry_run):
    damage(run)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as trainer:
        assert trainer.stdout.readline() == "held\n"
        before = everything(run)
        (found,) = garbage.collect(run.path.parent, keep=0, dry_run=dry_run)
        trainer.stdin.close()
    assert "being trained by another process" in found.why
    assert everything(run) == before


def test_the_verb(run, tmp_path):
    damage(run)
    result = CliRunner().invoke(app, ["runs", "gc", str(run.path.parent), "--dry-run"])
    assert result.exit_code == 0
    assert "would remove" in result.output
    with pytest.raises(InputError, match="no run in it"):
        garbage.collect(tmp_path / "nothing")
