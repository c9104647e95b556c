"""`rayfuse submit` for real: to a head node started here, and as a Slurm script run here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Head = Any  # of conftest.py

pytestmark = [pytest.mark.slow, pytest.mark.ray]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def head(start_head: Callable) -> Iterator[Head]:
    with start_head(num_cpus=2) as started:
        yield started


@pytest.fixture(scope="module")
def storage(make_shards: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared storage with shards, and a run's YAML of relative paths."""
    root = tmp_path_factory.mktemp("storage")
    make_shards(root / "shards", rows=240, image_size=32, hours=24)
    document = {
        "name": "tiny",
        "task": "mortality",
        "model": {"name": "lstm", "hidden": 8},
        "data": {"shards": "shards", "batches": {"cache_dir": str(root / "cache")}},
        "train": {"epochs": 400, "batch_size": 16, "patience": 1000, "log_every_steps": 1},
        "checkpoint": {"every_steps": 5},
        "scaling": {"num_workers": 1, "max_failures": 0},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return root


def _steps(storage: Path, name: str = "tiny") -> list[int]:
    found = (storage / "runs" / name / "checkpoints").glob("step-*/COMPLETE")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in found)


def _wait_for_step(
    storage: Path, step: int, process: subprocess.Popen[str], name: str = "tiny"
) -> int:
    deadline = time.monotonic() + 300
    while not (found := _steps(storage, name)) or found[-1] < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.2)
    return found[-1]


def _starts(storage: Path, name: str = "tiny") -> list[int]:
    """The step at which each attempt began."""
    parts = sorted((storage / "runs" / name / "metrics").glob("attempt-*/part-*.jsonl"))
    lines = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    events = [line for line in lines if line["kind"] == "event"]
    return [line["step"] for line in events if line["values"]["event"] == "start"]


def test_without_the_token_nothing_is_taken(head: Head, storage: Path, tmp_path: Path) -> None:
    train = ["submit", "--storage", str(storage), "train", str(storage / "run.yaml")]
    home = {"HOME": str(tmp_path), "RAY_AUTH_MODE": None}
    refused = head.rayfuse(*train, RAY_AUTH_TOKEN_PATH=None, **home)
    assert refused.returncode == 2
    assert "asks for a token, and none is set; set RAY_AUTH_TOKEN_PATH" in refused.stderr
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64, encoding="utf-8")
    listing = ["runs", "ls", "--address", head.address]
    refused = head.rayfuse(*listing, RAY_AUTH_TOKEN_PATH=str(wrong), **home)
    assert refused.returncode == 2
    assert "refuses this token" in refused.stderr
    listed = head.rayfuse(*listing)
    assert "nothing was submitted" in listed.stderr, "no refused command left a job"
    assert not (storage / "runs").exists()


def test_killed_stopped_and_continued(head: Head, storage: Path) -> None:
    train = ["submit", "--storage", str(storage), "train", str(storage / "run.yaml")]
    first = head.started(*train)
    _wait_for_step(storage, 10, first)
    assert (storage / "runs/tiny").stat().st_mode & 0o777 == 0o700
    again = head.rayfuse(*train)
    assert again.returncode == 2
    assert "tiny is running already as tiny@1" in again.stderr
    stopped = head.rayfuse("runs", "stop", "tiny", "--now")
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.startswith("tiny@1: failed")
    out, err = first.communicate(timeout=60)
    assert first.returncode == 1, (out, err)
    assert re.search(r"working directory: \d+ files, \d\.\d MiB zipped", err)

    before = _steps(storage)[-1]
    second = head.started(*train)
    stood = _wait_for_step(storage, before + 20, second)
    stopped = head.rayfuse("runs", "stop", "tiny")
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout == "tiny@2: stopped\n"
    out, err = second.communicate(timeout=60)
    assert second.returncode == 130, (out, err)
    assert "checkpoint written" in out
    logs = head.rayfuse("runs", "logs", "tiny")
    assert logs.returncode == 130
    assert "checkpoint written" in logs.stdout

    assert _starts(storage) == [0, before], "the second job continued the first"
    assert _steps(storage)[-1] >= stood
    short = ["train.epochs=1", "name=short"]
    done = head.rayfuse(*train, *short)
    assert done.returncode == 0, done.stderr
    assert "short: finished" in done.stdout
    listed = head.rayfuse("runs", "ls", "--address", head.address).stdout
    assert re.search(r"tiny +tiny@1 +failed", listed)
    assert re.search(r"tiny +tiny@2 +stopped", listed)
    assert re.search(r"short +short@1 +succeeded", listed)


def test_doctor_looks_at_the_nodes_as_a_job(head: Head, storage: Path) -> None:
    words = ["submit", "--storage", str(storage), "doctor", "--cluster", str(storage / "run.yaml")]
    done = head.rayfuse(*words)
    assert done.returncode == 0, done.stdout
    assert re.search(r"ok +nodes +1 of 1 answer", done.stdout)
    assert re.search(rf"ok +storage +{storage}/runs: written and seen by every node", done.stdout)


def test_a_failed_job_fails_the_command_with_its_words(head: Head, storage: Path) -> None:
    train = ["submit", "--storage", str(storage), "train", str(storage / "run.yaml")]
    failed = head.rayfuse(*train, "name=absent", "data.shards=nowhere")
    assert failed.returncode == 2
    assert "rayfuse: " in failed.stdout
    assert "nowhere" in failed.stdout


def test_ctrl_c_leaves_the_log_and_not_the_job(head: Head, storage: Path) -> None:
    train = ["submit", "--storage", str(storage), "train", str(storage / "run.yaml")]
    process = head.started(*train, "name=left")
    deadline = time.monotonic() + 120
    while not (storage / "runs/left/config.yaml").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "left@1 goes on. Come back: `rayfuse runs logs left@1`" in err
    listed = head.rayfuse("runs", "ls", "--address", head.address).stdout
    assert re.search(r"left +left@1 +running", listed)
    assert head.rayfuse("runs", "stop", "left", "--now").returncode == 0


SHIMS = {
    "srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": (
        '#!/bin/bash\nif [[ $1 == show ]]; then hostname; else echo "$2" >> "$REQUEUED"; fi\n'
    ),
}
# Ray's symmetric-run refuses to start beside another Ray, and ends with `ray stop`, which would
# stop those of other programs here.
ALONE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


def _allocation(script: Path, folder: Path, job: int) -> subprocess.Popen[str]:
    """The script as the first node of an allocation of one runs it."""
    for name, text in SHIMS.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{folder}:{os.environ['PATH']}",
        "HOME": str(folder),
        "REQUEUED": str(folder / "requeued"),
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_NUM_NODES": "1",
        "OMP_NUM_THREADS": "1",
    }
    with (folder / f"{job}.log").open("a") as log:
        return subprocess.Popen(
            [*ALONE, "bash", str(script)], env=environment, stdout=log, stderr=log, text=True
        )


def test_a_slurm_job_is_warned_requeued_and_goes_on(storage: Path, tmp_path: Path) -> None:
    probe = subprocess.run([*ALONE, "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip("PID namespaces are not allowed here, and Ray's symmetric-run needs one")
    script = tmp_path / "queued.sbatch"
    words = ["submit", "--target", "slurm", "--storage", str(storage), "--dry-run", "train"]
    words += [str(storage / "run.yaml"), "name=queued", "train.epochs=60"]
    made = subprocess.run([BIN / "rayfuse", *words], capture_output=True, text=True, check=True)
    script.write_text(made.stdout, encoding="utf-8")
    job = 10_000 + os.getpid() % 10_000
    first = _allocation(script, tmp_path, job)
    log = tmp_path / f"{job}.log"
    try:
        _wait_for_step(storage, 10, first, "queued")
        state = storage / "runs/.slurm" / str(job)
        assert state.stat().st_mode & 0o777 == 0o700
        assert (state / "auth_token").stat().st_mode & 0o777 == 0o600
        (batch,) = psutil.Process(first.pid).children()
        batch.send_signal(signal.SIGUSR1)
        assert first.wait(timeout=120) == 130, log.read_text()
        assert (tmp_path / "requeued").read_text() == f"{job}\n"
        assert not state.exists(), "the token goes with the allocation"
        stood = _steps(storage, "queued")[-1]
        second = _allocation(script, tmp_path, job)
        assert second.wait(timeout=300) == 0, log.read_text()
    finally:
        first.kill()
    assert (tmp_path / "requeued").read_text() == f"{job}\n", "finished: not queued again"
    assert _starts(storage, "queued") == [0, stood]
    assert (storage / "runs/queued/outcome.json").is_file()
    assert not Path(f"/tmp/rf-{job}").exists()
