"""`num_workers: [1, 2]` on real nodes: one is lost, another joins, and the losses stay the same.

The same as those of one process without Ray, that is.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import pytest

from fusion.training import loop, metrics_log
from fusion.training.strategy import Single
from ray_jobs import config as run_config
from ray_jobs import session, train
from ray_jobs.config import RunConfig
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.ray]
BEFORE_S = 600.0
INTERVAL = 4
# Steps are slow until the file `grown` is there: nodes take seconds to come and go.
SCRIPT = """
import sys, time
from pathlib import Path
import ray
from ray_jobs import cluster, config, train
from ray_jobs.faults import Strikers

run_file, grown, address = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
(run,) = config.load(run_file)

def slowed(session):
    beat = session.beat
    def slow(stage, progress):
        beat(stage, progress)
        if stage == "step" and not grown.exists():
            time.sleep(0.25)
    session.beat = slow

with cluster.connect(address):
    strikers, here = Strikers(), ray.get_runtime_context().get_node_id()

    def watch(status):
        far = [beat for beat in status.beats if beat.node in strikers.on and beat.node != here]
        if status.groups == 1 and far and far[0].updates >= 6:
            assert strikers.end_node(far[0].node)

    train.run(run, observer=train.Observer(watch, slowed))
"""


@pytest.fixture
def config(make_shards: Callable[..., Any], tmp_path: Path) -> RunConfig:
    make_shards(tmp_path / "shards", rows=60, image_size=32, hours=48)
    return RunConfig.model_validate(
        {
            "name": "elastic",
            "runs_dir": tmp_path / "runs",
            "task": "mortality",
            "model": {"name": "lstm", "hidden": 8, "dropout": 0.0},
            "data": {
                "shards": tmp_path / "shards",
                "batches": {"image": {"resize": 32, "size": 32}},
            },
            "optim": {"lr": 1e-3},
            "train": {"epochs": 60, "patience": 60, "batch_size": 5, "log_every_steps": 1},
            "checkpoint": {"every_steps": INTERVAL},
            "scaling": {"num_workers": [1, 2], "resize_every_s": 5},
        }
    )


def _events(config: RunConfig, event: str) -> list[dict[str, Any]]:
    lines = metrics_log.follow_files(config.folder / "metrics")
    return [line["values"] for line in lines if line["values"].get("event") == event]


def _losses(config: RunConfig) -> list[float]:
    lines = metrics_log.read(config.folder / "metrics")
    return [line["values"]["loss"] for line in lines if line["kind"] == "train"]


def _until(holds: Callable[[], bool], process: Any) -> None:
    """Look every half second until it holds."""
    deadline = time.monotonic() + BEFORE_S
    while not holds():
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_run_shrinks_and_grows_with_the_cluster(
    start_head: Callable[..., Any], config: RunConfig, tmp_path: Path
) -> None:
    grown, file = tmp_path / "grown", tmp_path / "elastic.yaml"
    run_config.dump(config, file)
    with start_head(num_cpus=1) as head:
        head.add_node()
        with head.python("-c", SCRIPT, str(file), str(grown), head.gcs) as driver:
            _until(lambda: len(_events(config, "recovered")) == 1, driver)
            head.add_node()
            _until(lambda: len(_events(config, "recovered")) == 2, driver)
            grown.touch()
            _, said = driver.communicate(timeout=BEFORE_S)
            assert driver.returncode == 0, said[-4000:]
    fixed = config.model_copy(update={"name": "fixed"})
    opened = session.open_session(fixed, RunFolder(fixed.folder), Single(), train.STOP)
    assert loop.fit(opened) == "epochs"
    opened.log.close()
    assert [start["world"] for start in _events(config, "start")] == [2, 1, 2]
    assert [start["world"] for start in _events(fixed, "start")] == [1]
    shrunk, regrown = _events(config, "recovered")
    assert re.match(r"(lost the node|the process) of rank [01]", shrunk["cause"])
    assert shrunk["replayed"] <= 2 * INTERVAL, "an interval, and one that was being written"
    assert regrown["cause"] == "the cluster changed: 2 worker(s) now"
    assert regrown["replayed"] <= 2 * INTERVAL
    losses = _losses(config)
    assert len(losses) == 60 * 8
    assert losses == pytest.approx(_losses(fixed), abs=1e-5)
