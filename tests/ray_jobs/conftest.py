"""Finished runs with untrained weights, Ray clusters of several nodes, and an S3 server.

All behind training is real.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

from fusion import registry
from fusion.training.checkpoint import write_weights
from ray_jobs import config as run_config
from ray_jobs.predicted import spec_of
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

BIN = Path(sys.executable).parent
START_S = 180
# It repeats the workers' output to drivers, which never ask for it (`log_to_driver` is off).
NO_LOG_MONITOR = ["--include-log-monitor=False"]
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_DEFAULT_REGION": "us-east-1",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}
IMAGE = {"resize": 24, "size": 24, "augment": False}


def _history(folder: Path, epochs: int) -> None:
    """Metrics lines as the training loop writes them."""
    lines = [{"kind": "event", "epoch": 0, "step": 0, "time": 1000.0, "values": {"event": "start"}}]
    lines[0]["values"]["updates"] = 0
    for epoch in range(epochs):
        step, start = 5 * (epoch + 1), 1000.0 + 10 * epoch
        train = {"task": 0.7 - 0.05 * epoch, "lr": 1e-3, "steps": 5, "of": 5 * epochs}
        val = {"auroc": 0.6 + 0.05 * epoch, "loss": 0.69 - 0.01 * epoch, "rows": 20, "best": True}
        for kind, seconds, values in (("train", 8, train), ("val", 9, val)):
            line = {"kind": kind, "epoch": epoch, "step": step, "time": start + seconds}
            lines.append({**line, "values": values})
    folder.mkdir(parents=True)
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "part-00001.jsonl").write_text(text + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def make_run(
    make_shards: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`make_run(model, seed, name, shards, rows, edit, **config)`: a finished run's folder.

    `options` is merged into the model's block, `batches` into data.batches.
    """
    root = tmp_path_factory.mktemp("runs")
    default = root / "shards"
    numbered = iter(range(1000))

    def make(
        model: str,
        *,
        seed: int = 0,
        name: str | None = None,
        shards: Path | None = None,
        rows: int = 240,
        edit: Callable[[list[dict]], None] | None = None,
        **config: object,
    ) -> Path:
        task = str(config.get("task", "phenotyping_48h"))
        if shards is None:
            shards = default if edit is None else root / f"shards-{next(numbered)}"
        if not (shards / "manifest.json").is_file():
            make_shards(shards, rows=rows, task=task, image_size=32, hours=24, edit=edit)
        chosen = registry.get(model)
        run = run_config.from_dump(
            {
                "name": name or f"{model}-{next(numbered)}",
                "runs_dir": root,
                "task": task,
                "model": chosen.tiny().model_dump(mode="json") | dict(config.pop("options", {})),
                "data": {
                    "shards": shards,
                    "batches": {
                        "image": IMAGE,
                        "cache_dir": root / "cache",
                        **dict(config.pop("batches", {})),
                    },
                },
                "evaluate": {"resamples": 40},
                "seed": seed,
                **config,
            }
        )
        torch.manual_seed(seed)
        built = chosen(run.model, spec_of(run))
        write_weights(run.folder / "best", built, {"selected": "best"})
        run_config.dump(run, RunFolder(run.folder).config)
        _history(RunFolder(run.folder).metrics / "attempt-1", epochs=3)
        return run.folder

    return make


@dataclass
class Head:
    """A head node of our own, further nodes beside it, and the variables that reach them.

    Attributes:
        address: Of the dashboard, http://...
        gcs: host:port that nodes and drivers join.
        environment: Of every command that is to use the cluster.
        folder: 0700, with the token and every node's files.
    """

    address: str
    gcs: str
    environment: dict[str, str]
    folder: Path
    nodes: list[subprocess.Popen[str]] = field(default_factory=list)

    def rayfuse(
        self, *words: str, timeout: float = 900, **variables: str | None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        with self.started(*words, **variables) as process:
            out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def started(
        self, *words: str, out: Any = subprocess.PIPE, **variables: str | None
    ) -> subprocess.Popen[str]:
        """Start a `rayfuse` command."""
        return self._open([str(BIN / "rayfuse"), *words], out, variables)

    def python(self, *words: str) -> subprocess.Popen[str]:
        """Start Python."""
        return self._open([sys.executable, *words], subprocess.PIPE, {})

    def _open(
        self, command: list[str], out: Any, variables: Mapping[str, str | None]
    ) -> subprocess.Popen[str]:
        merged = {**self.environment, **variables}
        return subprocess.Popen(
            command,
            env={name: value for name, value in merged.items() if value is not None},
            cwd=self.folder,
            stdout=out,
            stderr=out,
            text=True,
            # A shell gives what it runs in the background SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def add_node(self, num_cpus: int = 1) -> None:
        """Join a further node to the cluster."""
        number = len(self.nodes)
        command = ["start", f"--address={self.gcs}", "--block", f"--num-cpus={num_cpus}"]
        command += [f"--object-store-memory={80 * 2**20}", *NO_LOG_MONITOR]
        log = self.folder / f"node-{number}.log"
        self.nodes.append(_ray(command, self.environment, log))
        deadline = time.monotonic() + START_S
        # One after the other: nodes that start together take each other's ports.
        while "Ray runtime started" not in log.read_text(encoding="utf-8"):
            assert self.nodes[-1].poll() is None, log.read_text(encoding="utf-8")[-3000:]
            assert time.monotonic() < deadline, "the node did not come up"
            time.sleep(0.5)


def _ray(words: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[str]:
    with log.open("w") as handle:
        return subprocess.Popen(
            [str(BIN / "ray"), *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=handle,
            text=True,
        )


def _free_ports(count: int) -> list[str]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [str(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started, by their ids."""
    if process.poll() is not None:
        return
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    process.terminate()
    # A head that has lost a node waits for it beyond any patience.
    _, alive = psutil.wait_procs(family, timeout=5)
    for one in alive:
        one.kill()
    process.wait(timeout=30)


def _answers(address: str) -> bool:
    host, port = address.removeprefix("http://").split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


@pytest.fixture(scope="session")
def start_head() -> Callable[..., Any]:
    """`with start_head(num_cpus=2) as head:` a head node that asks for a token, ended after."""
    return _head


@contextmanager
def _head(*, num_cpus: int) -> Iterator[Head]:
    with tempfile.TemporaryDirectory(prefix="rf-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        assert folder.stat().st_mode & 0o777 == 0o700
        token = folder / "auth_token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="utf-8")
        gcs, dashboard, agent, client = _free_ports(4)
        environment = {
            **os.environ,
            # Ray Train frees a dead trial's CPUs through the state API, and asks which cluster is
            # meant where several are on one host.
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            # A node that is gone is waited for so long, before what is there is counted anew.
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("RAY_ADDRESS", None)
        command = ["start", "--head", "--block", f"--num-cpus={num_cpus}"]
        command += [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
        command += [f"--temp-dir={folder / 'r'}", f"--object-store-memory={128 * 2**20}"]
        command += NO_LOG_MONITOR
        process = _ray(command, environment, folder / "head.log")
        head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", environment, folder)
        try:
            deadline = time.monotonic() + START_S
            while not _answers(head.address):
                assert process.poll() is None, (folder / "head.log").read_text()
                assert time.monotonic() < deadline, "the head did not come up"
                time.sleep(0.5)
            yield head
            assert process.poll() is None, (folder / "head.log").read_text()[-3000:]
        finally:
            for node in head.nodes:
                _end(node)
            _end(process)


@pytest.fixture(scope="session")
def s3_port():
    """The port of an S3 server whose buckets are moto's own, in this process."""
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as environment:
        for name, value in CREDENTIALS.items():
            environment.setenv(name, value)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        yield server.get_host_and_port()[1]
        server.stop()


@pytest.fixture
def s3(s3_port):
    """`s3(bucket, make=True, prefix="")`: a storage path there, the bucket made first."""
    import boto3

    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3_port}")

    def path(bucket, *, make=True, prefix="runs"):
        if make:
            client.create_bucket(Bucket=bucket)
        query = f"scheme=http&endpoint_override=127.0.0.1:{s3_port}&region=us-east-1"
        return f"s3://{bucket}/{prefix}?{query}"

    path.client = client
    return path
