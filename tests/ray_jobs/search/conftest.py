"""Searches in this process: real shards, the real loop and its checkpoints; no Ray."""

from __future__ import annotations

import pytest

from data.files import write_json
from data.manifest import Manifest
from fusion.training import loop
from fusion.training.strategy import Single
from ray_jobs import lineage, mirror, session, train
from ray_jobs.config import RunConfig
from ray_jobs.heartbeat import Beat, Status
from ray_jobs.runs import RunFolder
from ray_jobs.search import runner
from ray_jobs.search.serial import Serial
from ray_jobs.search.space import SearchConfig
from ray_jobs.tune import Plan

HERE = Status(beats=(Beat(0, 1, "node", "host", 1),))


@pytest.fixture(scope="session")
def search_shards(make_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search-shards")
    make_shards(folder, rows=60, image_size=32, hours=24)
    return folder


@pytest.fixture
def make_plan(search_shards, tmp_path):
    """`make_plan(search block, name=..., **run blocks)`: a search over a tiny LSTM."""

    def make(search: dict, name: str = "search", *, confirm: bool = False, **blocks) -> Plan:
        value = {
            "name": "one",
            "runs_dir": tmp_path / "runs",
            "task": "mortality",
            "model": {"name": "lstm", "hidden": 4},
            "data": {"shards": search_shards},
            "optim": {"lr": 1e-2},
            "train": {"epochs": 3, "batch_size": 12, "log_every_steps": 1},
            "scaling": {"num_workers": 1},
            **blocks,
        }
        document = {"metrics": {"auroc": "max"}, **search}
        run = RunConfig.model_validate(value)
        return Plan(name, run, SearchConfig.model_validate(document), confirm=confirm)

    return make


def train_here(config, *, observer):
    """`train.run` with one worker, which is this process."""
    config = lineage.claim(config, Manifest.load(config.data.shards), fork=False)
    folder = RunFolder(config.folder)
    stop = folder.path / train.STOP
    stop.unlink(missing_ok=True)
    with lineage.locked(folder), mirror.kept(config, folder) as copy:
        if folder.outcome.is_file():
            return folder.path
        here = session.open_session(config, folder, Single(), train.STOP)
        here.stop_requested = stop.exists
        here.after_validation = lambda values: observer.watch(HERE)
        ending = loop.fit(here)
        if ending == "interrupted":
            raise KeyboardInterrupt("asked")
        write_json(folder.outcome, {"ending": ending})
        if copy is not None:
            copy.push()
    return folder.path


@pytest.fixture
def serial(monkeypatch):
    """`serial(plan)`: an executor that trains a plan's trials in this process."""
    monkeypatch.setattr(train, "run", train_here)

    def make(plan: Plan, told=lambda job, kind, value: None) -> Serial:
        def body(job, tell):
            def heard(kind, value):
                tell(kind, value)
                told(job, kind, value)

            return runner.run_job(plan.run, plan.folder, job, heard)

        return Serial(body)

    return make
