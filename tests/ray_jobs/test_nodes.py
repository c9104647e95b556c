"""`doctor --cluster`: what a node says of itself, and what follows from several that disagree."""

from __future__ import annotations

import dataclasses
import sys
from importlib import metadata
from typing import TYPE_CHECKING

import pytest
import yaml

from data.errors import InputError
from ray_jobs import config as run_config
from ray_jobs import nodes

if TYPE_CHECKING:
    from pathlib import Path


def _node(name: str = "a", **changes: object) -> nodes.Node:
    good = nodes.Node(
        name,
        versions=dict.fromkeys(("python", *nodes.PACKAGES), "1.0"),
        clock=(0.01, 0.005),
        gpus=["NVIDIA H100", "NVIDIA H100"],
        gpus_offered=2,
        nccl="2.27",
        free_gb={"/tmp": 50.0, "/mnt/runs": 900.0},
        weights={"/mnt/base.safetensors": "abc"},
        sees=2,
    )
    return dataclasses.replace(good, **changes)


def _failures(*found: nodes.Node) -> list[str]:
    return [f"{name}: {detail}" for verdict, name, detail in nodes.judge(list(found))
            if verdict == "FAIL"]  # fmt: skip


def test_nodes_that_agree_pass() -> None:
    assert _failures(_node("a"), _node("b")) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"versions": {**_node().versions, "torch": "2.0"}},
            ["torch: 1.0 on a; 2.0 on b: install the same everywhere"],
        ),
        (
            {"versions": {**_node().versions, "rayfuse": "1.0 (f00)"}},
            ["rayfuse: 1.0 on a; 1.0 (f00) on b: install the same everywhere"],
        ),
        ({"clock": (-3.2, 0.1)}, ["clocks: b by -3.2 s: set them by NTP"]),
        ({"clock": (1.3, 0.5)}, []),
        ({"gpus": ["NVIDIA H100"]}, ["gpus: b: offers 2, but torch sees 1: check the driver"]),
        (
            {"free_gb": {"/tmp": 1.0, "/mnt/runs": 9.0}},
            ["disk: b: 1.0 GB free at /tmp (at least 5)"],
        ),
        (
            {"weights": {"/mnt/base.safetensors": None}},
            ["weights: /mnt/base.safetensors is missing on b"],
        ),
        (
            {"weights": {"/mnt/base.safetensors": "other"}},
            ["weights: /mnt/base.safetensors differs between nodes: copy it again"],
        ),
        (
            {"written": "/mnt/runs: Permission denied"},
            ["storage: not writable from b (/mnt/runs: Permission denied)"],
        ),
        ({"sees": 1}, ["storage: /mnt/runs is not one folder to b: share it"]),
        ({"fault": "look: ModuleNotFoundError: No module named 'ray_jobs'"},
         ["node: b: look: ModuleNotFoundError: No module named 'ray_jobs'"]),
    ],
)  # fmt: skip
def test_each_disagreement_is_one_line_that_names_the_node(
    changes: dict[str, object], said: list[str]
) -> None:
    others = {} if changes.get("fault") is None else {"sees": 1}
    assert _failures(_node("a", **others), _node("b", **changes)) == said


def test_a_cluster_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match="rayfuse submit doctor --cluster"):
        nodes.examine(None)


@pytest.mark.ray
def test_a_real_node_says_what_it_is(ray_session: None, tmp_path: Path) -> None:
    weights = tmp_path / "base.safetensors"
    weights.write_bytes(b"w" * 3_000_000)
    document = {
        "name": "one",
        "runs_dir": str(tmp_path / "runs"),
        "task": "mortality",
        "model": {"name": "lstm"},
        "data": {"shards": "/nowhere"},
        "init_from": {"encoder": str(weights)},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    (node,) = nodes.survey(run_config.load(path))
    assert node.fault is None
    assert node.versions["python"] == sys.version.split()[0]
    assert node.versions["torch"] == metadata.version("torch")
    assert node.written is None
    assert node.sees == 1
    assert abs(node.clock[0]) < 1 + node.clock[1]
    assert list((tmp_path / "runs").iterdir()) == [], "the marks are taken away"
    before = node.weights[str(weights)]
    with weights.open("r+b") as handle:
        handle.seek(2_999_999)
        handle.write(b"x")
    weights.touch()
    (again,) = nodes.survey(run_config.load(path))
    assert again.weights[str(weights)] != before
    (tmp_path / "file").write_text("", encoding="utf-8")
    lines, healthy = nodes.examine(_with(path, document, tmp_path / "file"), "auto")
    assert not healthy
    assert any(line.startswith("FAIL  storage") and "Not a directory" in line for line in lines)
    assert any(line.startswith("FAIL  weights") for line in lines)


def _with(path: Path, document: dict, file: Path) -> Path:
    """The run with its storage below a file, and base weights that are not there."""
    changed = {**document, "runs_dir": str(file / "runs"), "init_from": {"": "/no/base.pt"}}
    path.write_text(yaml.safe_dump(changed), encoding="utf-8")
    return path
