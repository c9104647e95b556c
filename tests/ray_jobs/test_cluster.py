"""The local Ray instance: private, closed, gone afterwards; an address that nobody answers."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from data.errors import InputError
from ray_jobs import cluster


@pytest.mark.ray
def test_the_instance_is_private_and_asks_for_its_token(ray_session: None) -> None:
    import ray

    node = ray._private.worker._global_node
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    scratch = token.parent
    assert Path(node.get_session_dir_path()).is_relative_to(scratch)
    assert scratch.stat().st_mode & 0o777 == 0o700
    assert token.stat().st_mode & 0o777 == 0o600
    assert not (Path.home() / ".ray" / "auth_token").exists()
    host = node.address_info["webui_url"]
    assert host.startswith("127.0.0.1:")
    address = f"http://{host}/api/jobs/"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(address, timeout=10)
    assert refused.value.code == 401
    bearer = {"Authorization": f"Bearer {token.read_text(encoding='utf-8')}"}
    with urllib.request.urlopen(urllib.request.Request(address, headers=bearer), timeout=10) as ok:
        assert ok.status == 200


@pytest.mark.ray
def test_a_connected_process_is_used_as_it_is(ray_session: None) -> None:
    import ray

    before = ray.get_runtime_context().get_node_id()
    with cluster.connect(num_cpus=64):
        assert ray.get_runtime_context().get_node_id() == before
        assert ray.cluster_resources()["CPU"] < 64
    assert ray.is_initialized()


def test_a_start_that_times_out_is_tried_again_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(cluster.tempfile, "tempdir", None)
    tries = []

    def late(num_cpus: int | None, scratch: Path) -> None:
        tries.append(scratch)
        if len(tries) < cluster.START_ATTEMPTS:
            raise RuntimeError("The current node timed out during startup.")

    monkeypatch.setattr(cluster, "_init", late)
    assert cluster._start(None) == tries[-1]
    assert [path.exists() for path in tries] == [False, False, True]

    def broken(num_cpus: int | None, scratch: Path) -> None:
        tries.append(scratch)
        raise RuntimeError("out of file descriptors")

    monkeypatch.setattr(cluster, "_init", broken)
    with pytest.raises(RuntimeError, match="descriptors"):
        cluster._start(None)
    assert not tries[-1].exists()


def test_an_address_that_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def nobody(**options: object) -> None:
        raise ConnectionError("could not connect")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", nobody)
    with pytest.raises(InputError, match="unset RAY_ADDRESS"), cluster.connect("10.0.0.1:6379"):
        raise AssertionError("connected")
