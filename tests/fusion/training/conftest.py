"""The harness as a module, and as a script that trains on several workers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fusion.training import checkpoint

SCRIPT = Path(__file__).parent / "harness.py"
ROOT = SCRIPT.parents[3]


@pytest.fixture(scope="session")
def harness():
    """The harness module: Job, Toy, Rows, session, ..."""
    spec = importlib.util.spec_from_file_location("training_harness", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module


class Outcome:
    """What the workers of one job left: results and weights by rank, exit codes."""

    def __init__(self, job, codes):
        self.job, self.codes = job, codes
        ranks = range(job.world)
        out = Path(job.out)
        self.results = [
            json.loads(path.read_text())
            for path in (out / f"rank-{rank}.json" for rank in ranks)
            if path.exists()
        ]
        self.weights = [
            load_file(path)
            for path in (out / f"rank-{rank}.safetensors" for rank in ranks)
            if path.exists()
        ]

    def curve(self, name="loss"):
        """The values of one name in worker 0's training lines."""
        lines = self.results[0]["lines"]
        return [line["values"].get(name) for line in lines if line["kind"] == "train"]

    def scores(self, rank=0):
        lines = self.results[rank]["lines"]
        return [line["values"]["auroc"] for line in lines if line["kind"] == "val"]


class Resume:
    """What two runs' last checkpoints hold, compared."""

    @staticmethod
    def held(folder):
        return checkpoint.read(checkpoint.newest_complete(folder / "checkpoints"))

    def state(self, folder):
        """Whole weights without those left to a base, and moments, of whatever many workers."""
        held = self.held(folder)
        parts = {"weights": {}, "moments": {}}
        for name in held.meta.files:
            kind = Path(name).stem
            if kind in parts:
                parts[kind] |= load_file(held.path / name)
        return parts

    def gap(self, folder, other):
        """The largest difference of weights and of moments."""
        ours, theirs = self.state(folder), self.state(other)
        gaps = {}
        for kind in ours:
            assert ours[kind].keys() == theirs[kind].keys()
            gaps[kind] = max(
                float((ours[kind][name].double() - theirs[kind][name].double()).abs().max())
                for name in ours[kind]
            )
        return gaps

    def position(self, folder):
        """Where a run stands, without the score of its best epoch; and its schedule."""
        meta = self.held(folder).meta
        schedule = {
            name: value
            for name, value in meta.schedule.items()
            if name in ("num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr")
        }
        return {**meta.progress.dump(), "best_score": None}, schedule

    @staticmethod
    def rows_used(outcome):
        """Global step -> its rows, in order, over all workers."""
        used = {}
        for result in outcome.results:
            for epoch, step, rows in result["used"]:
                used.setdefault((epoch, step), []).extend(rows)
        return used


@pytest.fixture(scope="session")
def resume():
    """Comparisons of checkpoints."""
    return Resume()


@pytest.fixture(scope="session")
def train_jobs():
    """A function that runs jobs one after another in one process tree; their Outcomes."""

    def run(folder, jobs):
        folder.mkdir(parents=True, exist_ok=True)
        listing, codes = folder / "jobs.json", folder / "codes.json"
        listing.write_text(json.dumps([asdict(job) for job in jobs]))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"
        environment["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(listing), str(codes)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        outcomes = [
            Outcome(job, code)
            for job, code in zip(jobs, json.loads(codes.read_text()), strict=True)
        ]
        for outcome in outcomes:
            outcome.stderr = done.stderr
        return outcomes

    return run


@pytest.fixture(scope="session")
def train_named(train_jobs, tmp_path_factory):
    """A function from named jobs to named outcomes."""

    def run(jobs):
        done = train_jobs(tmp_path_factory.mktemp("jobs"), list(jobs.values()))
        return dict(zip(jobs, done, strict=True))

    return run
