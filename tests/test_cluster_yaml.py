"""cluster.yaml is what Ray's cluster launcher accepts, and starts no Ray without its token."""

from __future__ import annotations

from pathlib import Path

import yaml

CLUSTER = Path(__file__).parents[1] / "cluster.yaml"


def test_ray_accepts_it() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(CLUSTER.read_text(encoding="utf-8"))
    validate_config(prepare_config(config))


def test_every_start_asks_for_the_token_and_uses_the_locked_environment() -> None:
    config = yaml.safe_load(CLUSTER.read_text(encoding="utf-8"))
    for kind in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[kind] if "ray start" in command]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=" in starts[0]
        assert "~/rayfuse/.venv/bin/ray start" in starts[0]
    assert any("make install" in command for command in config["setup_commands"])
