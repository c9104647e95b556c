"""A host that is cut off from the network in the middle of a step: the run goes on without it."""

from __future__ import annotations

import json
import secrets
import time
from typing import TYPE_CHECKING

import pytest
import torch
import yaml

from fusion.training import metrics_log
from fusion.training.checkpoint import read_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

pytestmark = [pytest.mark.slow, pytest.mark.ray]
PORT = 6399
# Of Ray's waits, shorter: five unanswered questions, and the nodes are as good as gone.
WAITS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
}


def _document(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "runs_dir": "/mnt/rayfuse/runs",
        "task": "mortality",
        "model": {"name": "lstm", "hidden": 8, "dropout": 0.3},
        "data": {
            "shards": "/mnt/rayfuse/shards",
            "batches": {"cache_dir": "/mnt/rayfuse/cache"},
        },
        "train": {"epochs": 8, "batch_size": 16, "patience": 1000, "log_every_steps": 1},
        "checkpoint": {"every_steps": 5},
        "scaling": {"num_workers": 2, "max_failures": 2},
    }


def _wait_for_step(run: Path, step: int, process: Any) -> None:
    deadline = time.monotonic() + 300
    while True:
        steps = [line["step"] for line in metrics_log.read(run / "metrics")]
        if steps and steps[-1] >= step:
            return
        assert process.poll() is None, process.log.read_text()[-3000:]
        assert time.monotonic() < deadline, "no step"
        time.sleep(0.05)


def _join(host: Any, head: str | None) -> None:
    """Start a Ray node on a host, its files on a disk of its own."""
    where = ["--head", f"--port={PORT}", "--dashboard-host=127.0.0.1"]
    if head is not None:
        where = [f"--address={head}:{PORT}"]
    else:
        where.append("--temp-dir=/mnt/home/r")
    words = ["ray", "start", *where, "--num-cpus=1", f"--node-ip-address={host.address}"]
    words += ["--disable-usage-stats", "--include-log-monitor=False"]
    host.run(*words, f"--object-store-memory={80 * 2**20}")


def test_the_run_goes_on_on_the_hosts_that_answer(network: Any, make_shards: Callable) -> None:
    make_shards(network.storage / "shards", rows=240, image_size=32, hours=24)
    token = network.storage / "auth_token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    first, second, third = (network.add() for _ in range(3))
    for host in network.hosts:
        host.environment |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": "/mnt/rayfuse/auth_token",
            **WAITS,
        }
    _join(first, None)
    _join(second, first.address)
    runs = network.storage / "runs"
    for name in ("undisturbed", "cut"):
        document = yaml.safe_dump(_document(name))
        (network.storage / f"{name}.yaml").write_text(document, encoding="utf-8")
    reach = {"RAY_ADDRESS": f"{first.address}:{PORT}"}
    first.run("rayfuse", "train", "/mnt/rayfuse/undisturbed.yaml", timeout=600, **reach)
    process = first.start("rayfuse", "train", "/mnt/rayfuse/cut.yaml", **reach)
    _wait_for_step(runs / "cut", 12, process)
    second.cut_off()
    _join(third, first.address)
    assert process.wait(timeout=600) == 0, process.log.read_text()[-3000:]

    lines = list(metrics_log.follow_files(runs / "cut" / "metrics"))
    (recovered,) = [line["values"] for line in lines if line["values"].get("event") == "recovered"]
    assert recovered["attempt"] == 2
    assert recovered["replayed"] <= 5, "at most one checkpoint interval"
    assert recovered["cause"], "the log names it"
    one, other = (read_weights(runs / name / "best")[0] for name in ("undisturbed", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    outcomes = [json.loads((runs / name / "outcome.json").read_text()) for name in ("cut",)]
    assert outcomes[0]["error"] is None
