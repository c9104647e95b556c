"""The cluster files are what Ray's launcher accepts, and ask for a token; the image holds code."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = ["cluster.yaml", "cluster-aws.yaml"]


def _load(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_it(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(_load(name)))


@pytest.mark.parametrize("name", FILES)
def test_every_start_asks_for_the_token_and_uses_the_locked_environment(name: str) -> None:
    config = _load(name)
    for kind in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[kind] if "ray start" in command]
        assert len(starts) == 1
        assert starts[0].startswith("set -a; . ~/rayfuse/cluster.env; set +a;")
    head = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    for remote, local in config["file_mounts"].items():
        assert Path(local).name == Path(remote).name
        assert local.startswith("~/.rayfuse/") or (ROOT / local).is_file()
    setup = "\n".join(config["setup_commands"])
    assert "-r ~/rayfuse/requirements.lock" in setup
    assert "chmod 700 ~/.rayfuse" in setup
    assert "mount -t nfs4" in setup


def test_the_variables_reach_a_process_started_after_them(tmp_path: Path) -> None:
    text = (ROOT / "cluster.env").read_text(encoding="utf-8")
    chosen = text.replace("#NCCL", "NCCL").replace("#GLOO", "GLOO")
    (tmp_path / "cluster.env").write_text(chosen, encoding="utf-8")
    done = subprocess.run(
        ["bash", "-c", f"set -a; . {tmp_path}/cluster.env; set +a; exec env"],
        env={"HOME": "/home/someone", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert lines["RAY_AUTH_MODE"] == "token"
    assert lines["RAY_AUTH_TOKEN_PATH"] == "/home/someone/.rayfuse/auth_token"
    assert lines["PATH"].startswith("/home/someone/rayfuse/.venv/bin:")
    assert {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA"} <= set(lines)


def test_the_aws_twin_has_gpu_workers_and_an_idle_head() -> None:
    types = _load("cluster-aws.yaml")["available_node_types"]
    assert types["gpu"]["resources"]["GPU"] == 4
    assert types["head"]["resources"]["CPU"] == 0
    twin = _load("cluster.yaml")
    for key in ("head_start_ray_commands", "worker_start_ray_commands", "file_mounts"):
        assert _load("cluster-aws.yaml")[key] == twin[key]


def test_commands_are_sound_bash() -> None:
    for name in FILES:
        config = _load(name)
        for key, commands in config.items():
            if not key.endswith("_commands"):
                continue
            for command in commands:
                subprocess.run(["bash", "-nc", command], check=True)


def test_the_image_gets_code_and_nothing_else() -> None:
    """Everything is kept from the builder but what is copied, and of that all kinds of data."""
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    assert rules[0] == "*"
    copied = [
        word
        for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
        if line.startswith("COPY ")
        for word in line.split()[1:-1]
    ]
    allowed = {rule[1:] for rule in rules if rule.startswith("!") and "*" not in rule}
    assert set(copied) == allowed
    assert all((ROOT / name).exists() for name in copied)
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split("# Patient data", 1)[1]
    patterns = {line for line in ignored.splitlines() if line.startswith("*")}
    assert {f"**/{pattern}" for pattern in patterns} <= set(rules)
