"""`ray up cluster.yaml` for real: over ssh to two hosts, with the shipped setup and start commands.

Changed are the addresses, the user and the key. The hosts' environment and storage are there
already, so that the setup finds nothing to download.
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

pytestmark = [pytest.mark.slow, pytest.mark.ray]
ROOT = Path(__file__).parents[3]
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
SETTINGS = """\
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
PidFile none
SetEnv PATH={home}/.local/bin:{paths} OMP_NUM_THREADS=1 RAY_TMPDIR={home}
"""


def _uv() -> str | None:
    """The program itself: a shim would look for it in the user's real home."""
    for python in (sys.executable, "python3"):
        script = "import uv; print(uv.find_uv_bin())"
        done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return shutil.which("uv")


def _serve(host: Any, public: str) -> None:
    """Let `host` be reached over ssh, with the environment that cluster.yaml's setup would make."""
    folder = host.folder
    _key(folder / "host_key")
    (folder / "authorized_keys").write_text(public, encoding="utf-8")
    text = SETTINGS.format(folder=folder, home="/mnt/home", paths=os.defpath)
    (folder / "sshd_config").write_text(text, encoding="utf-8")
    (host.home / ".bashrc").touch()
    profile = 'PATH="$HOME/.local/bin:$PATH"\n'  # as Debian's and Ubuntu's skeleton
    (host.home / ".profile").write_text(profile, encoding="utf-8")
    (host.home / "rayfuse").mkdir()
    (host.home / "rayfuse/.venv").symlink_to(sys.prefix)
    (host.home / ".local/bin").mkdir(parents=True)
    (host.home / ".local/bin/uv").symlink_to(_uv())
    host.run("mount", "-t", "tmpfs", "none", "/run")
    host.run("mkdir", "-p", "/run/sshd")
    host.run(SSHD, "-f", str(folder / "sshd_config"), "-E", str(folder / "sshd.log"))


def _key(path: Path) -> str:
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(words, check=True, timeout=60, stdin=subprocess.DEVNULL)
    return path.with_suffix(".pub").read_text(encoding="utf-8")


def _cluster_file(head: Any, worker: Any) -> str:
    """The shipped file with this network's addresses, one worker, the user and the key."""
    document = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    document["provider"] |= {"head_ip": head.address, "worker_ips": [worker.address]}
    document["auth"] = {"ssh_user": getpass.getuser(), "ssh_private_key": "~/.ssh/id_ed25519"}
    document["min_workers"] = document["max_workers"] = 1
    return yaml.safe_dump(document)


@pytest.fixture
def needs() -> None:
    lacking = [tool for tool in ("ssh", "ssh-keygen", "rsync") if shutil.which(tool) is None]
    if SSHD is None or lacking:
        said = ", ".join([*lacking, *(["sshd"] if SSHD is None else [])])
        pytest.skip(f"ray up goes over ssh, and here is no {said}")
    if _uv() is None:
        pytest.skip("cluster.yaml's setup uses uv, and here is none")


@pytest.mark.usefixtures("needs")
def test_a_cluster_comes_up_trains_and_goes_down(network: Any, make_shards: Callable) -> None:
    user, head, worker = (network.add() for _ in range(3))
    make_shards(network.storage / "shards", rows=60, image_size=32, hours=24)
    (user.home / ".ssh").mkdir(mode=0o700)
    public = _key(user.home / ".ssh/id_ed25519")
    for host in (head, worker):
        _serve(host, public)
    (user.home / ".rayfuse").mkdir(mode=0o700)
    token = user.home / ".rayfuse/auth_token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    for name in ("requirements.lock", "cluster.env"):
        shutil.copy(ROOT / name, user.home / name)
    (user.home / "cluster.yaml").write_text(_cluster_file(head, worker), encoding="utf-8")
    document = {
        "name": "up",
        "task": "mortality",
        "model": {"name": "lstm", "hidden": 8},
        "data": {"shards": "shards", "batches": {"cache_dir": "/mnt/rayfuse/cache"}},
        "train": {"epochs": 1, "batch_size": 16},
        "scaling": {"num_workers": 2, "resources_per_worker": {"CPU": 1}},
    }
    (network.storage / "run.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    up = "cd && RAY_UP_enable_autoscaler_v2=0 ray up -y --no-config-cache cluster.yaml"
    said = user.run("bash", "-c", up, timeout=600)
    assert "Useful commands" in said or "New status" in said, said[-3000:]

    tunnel = user.start(
        "ssh", "-i", "/mnt/home/.ssh/id_ed25519", "-o", "StrictHostKeyChecking=no", "-o",
        "UserKnownHostsFile=/dev/null", "-N", "-L", "8265:127.0.0.1:8265", head.address,
    )  # fmt: skip
    reach = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": "/mnt/home/.rayfuse/auth_token",
        "PYTHONPATH": str(ROOT),
    }
    _wait_for_port(user)
    submit = ["rayfuse", "submit", "--storage", "/mnt/rayfuse"]
    _until_both_answer(user, submit, reach)
    trained = user.run(*submit, "train", "/mnt/rayfuse/run.yaml", timeout=600, **reach)
    assert "up: finished" in trained
    assert (network.storage / "runs/up/outcome.json").is_file()
    assert tunnel.poll() is None
    down = "cd && RAY_UP_enable_autoscaler_v2=0 ray down -y cluster.yaml"
    said = user.run("bash", "-c", down, timeout=300)
    deadline = time.monotonic() + 240  # workers end once the head is gone
    for host in (head, worker):
        while raylets := _raylets(host):
            assert time.monotonic() < deadline, f"{host.name} still runs {raylets}\n{said[-3000:]}"
            time.sleep(1)


def _raylets(host: Any) -> list[str]:
    listed = host.run("ps", "-eo", "stat,args").splitlines()
    return [line for line in listed if "raylet/raylet" in line and not line.startswith("Z")]


def _wait_for_port(user: Any) -> None:
    user.run(
        "bash", "-c",
        "for i in $(seq 120); do (echo > /dev/tcp/127.0.0.1/8265) 2>/dev/null && exit 0; sleep 0.5;"
        " done; exit 1",
    )  # fmt: skip


def _until_both_answer(user: Any, submit: list[str], reach: dict[str, str]) -> None:
    """The head's autoscaler starts the worker over ssh, a while after `ray up` has ended."""
    deadline = time.monotonic() + 400
    said = ""
    while time.monotonic() < deadline:
        said = user.run(*submit, "doctor", "--cluster", "/mnt/rayfuse/run.yaml", **reach)
        if re.search(r"ok +nodes +2 of 2 answer", said):
            return
        time.sleep(5)
    raise AssertionError(f"the worker did not come up: {said[-3000:]}")
