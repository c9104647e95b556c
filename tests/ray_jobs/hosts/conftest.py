"""Several hosts on one machine: each with a network, process ids, a home and mounts of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

TOOLS = ("unshare", "nsenter", "setpriv", "ip", "mount")
DIES_WITH_US = ["setpriv", "--pdeathsig", "KILL"]
NETWORK = "10.231.77"
HOME = "/mnt/home"
STORAGE = "/mnt/rayfuse"
BIN = Path(sys.executable).parent


@dataclass
class Host:
    """A host of its own; it ends with its first process.

    Attributes:
        name: host-1, ...
        address: Within the network of these hosts.
        folder: Its files; home/ in it is what it sees as the user's home.
        init: Its first process, whose end is the host's.
    """

    name: str
    address: str
    folder: Path
    init: subprocess.Popen[bytes]
    pid: int
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        """Its home folder, seen from outside."""
        return self.folder / "home"

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command on it; output goes to a file of its own."""
        log = self.folder / f"{Path(command[0]).name}-{time.monotonic_ns()}.log"
        with log.open("w") as handle:
            process = subprocess.Popen(
                self._inside(command),
                env=self.environment | environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.STDOUT,
                text=True,
            )
        process.log = log  # type: ignore[attr-defined]
        return process

    def run(self, *command: str, timeout: float = 300, **environment: str) -> str:
        """Run a command on it to its end; its output."""
        done = subprocess.run(
            self._inside(command),
            env=self.environment | environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        said = f"{done.stdout}\n{done.stderr}"
        assert done.returncode == 0, f"{self.name}: {command}: exit {done.returncode}\n{said}"
        return said

    def cut_off(self) -> None:
        """Take its network away, as a pulled cable does: nothing is told, nothing answers."""
        self.run("ip", "link", "set", "eth0", "down")

    def _inside(self, command: tuple[str, ...]) -> list[str]:
        return ["nsenter", f"--target={self.pid}", "--net", "--pid", "--mount", *command]


class Network:
    """A bridge in a namespace of its own, and the hosts that are plugged into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts: list[Host] = []
        self._switch = subprocess.Popen([*DIES_WITH_US, "unshare", "--net", "sleep", "infinity"])
        (self.folder / "storage").mkdir()
        self._wait_for_namespace(self._switch.pid)
        self._on_switch("ip", "link", "add", "name", "br0", "type", "bridge")
        self._on_switch("ip", "link", "set", "br0", "up")

    def add(self) -> Host:
        """Plug a new host in."""
        number = len(self.hosts) + 1
        folder = self.folder / f"host-{number}"
        (folder / "home").mkdir(parents=True)
        # --kill-child: the host, pid 1 of its namespace, dies with the process started here.
        words = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        init = subprocess.Popen([*DIES_WITH_US, *words, "sleep", "infinity"])
        host = Host(f"host-{number}", f"{NETWORK}.{number}", folder, init, _child(init.pid))
        host.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "HOME": HOME,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        }
        self.hosts.append(host)
        port = f"port{number}"
        self._on_switch("ip", "link", "add", "name", port, "type", "veth", "peer", "name", "eth0",
                        "netns", str(host.pid))  # fmt: skip
        self._on_switch("ip", "link", "set", port, "master", "br0", "up")
        host.run("ip", "link", "set", "lo", "up")
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        # Ray takes the address of the default route for the node's own.
        host.run("ip", "route", "add", "default", "dev", "eth0")
        host.run("mount", "-t", "tmpfs", "none", "/mnt")
        host.run("mkdir", HOME, STORAGE)
        for source, target in ((host.home, HOME), (self.folder / "storage", STORAGE)):
            host.run("mount", "--bind", str(source), target)
        # Who asks the system for the user's home gets this one too.
        user = pwd.getpwuid(os.getuid())
        entry = f"{user.pw_name}:x:{user.pw_uid}:{user.pw_gid}::{HOME}:/bin/bash\n"
        others = [
            line
            for line in Path("/etc/passwd").read_text(encoding="utf-8").splitlines(keepends=True)
            if not line.startswith(f"{user.pw_name}:")
        ]
        (folder / "passwd").write_text("".join([entry, *others]), encoding="utf-8")
        host.run("mount", "--bind", str(folder / "passwd"), "/etc/passwd")
        return host

    @property
    def storage(self) -> Path:
        """What every host sees as /mnt/rayfuse."""
        return self.folder / "storage"

    def close(self) -> None:
        """End every host and the bridge."""
        for process in [*(host.init for host in self.hosts), self._switch]:
            process.kill()
            process.wait(timeout=30)

    def _on_switch(self, *command: str) -> None:
        inside = ["nsenter", f"--target={self._switch.pid}", "--net"]
        subprocess.run([*inside, *command], check=True, capture_output=True, timeout=30)

    def _wait_for_namespace(self, pid: int) -> None:
        own = Path("/proc/self/ns/net").readlink()
        deadline = time.monotonic() + 30
        while Path(f"/proc/{pid}/ns/net").readlink() == own:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _child(pid: int) -> int:
    """The process that `unshare --fork` made, once its own program runs."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = children.read_text().split()
        if found and b"sleep" in Path(f"/proc/{found[0]}/cmdline").read_bytes():
            return int(found[0])
        time.sleep(0.01)
    raise AssertionError("the host did not start")


@pytest.fixture
def network() -> Iterator[Network]:
    """An empty network of hosts; the test is skipped where the kernel or the user forbids it."""
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        pytest.skip(f"hosts of their own need {', '.join(lacking)}")
    command = "ip link add name br0 type bridge && mount -t tmpfs none /mnt"
    probe = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", command]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(
            f"network, mount and PID namespaces are not allowed here: {done.stderr.strip()}"
        )
    with tempfile.TemporaryDirectory(prefix="rf-", ignore_cleanup_errors=True) as name:
        made = Network(Path(name))
        try:
            yield made
        finally:
            made.close()
