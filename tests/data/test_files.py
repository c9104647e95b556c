"""The write seam: whole or not at all, whatever fails."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.files import atomic_path, sha256_file, write_json, write_text


def _leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".partial")]


def _write_half(path: Path) -> None:
    path.write_text("half", encoding="utf-8")
    raise OSError("half")


def test_a_failing_block_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("old", encoding="utf-8")
    with pytest.raises(OSError, match="half"), atomic_path(target) as temporary:
        _write_half(temporary)
    assert target.read_text(encoding="utf-8") == "old"
    assert _leftovers(tmp_path) == []


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "manifest.json"
    write_text(target, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(target, {"new": True})
    assert target.read_text(encoding="utf-8") == "old"
    assert _leftovers(tmp_path) == []


def test_a_killed_writer_never_shows_a_half_file(tmp_path: Path) -> None:
    target = tmp_path / "shard.bin"
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from data.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half')\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(target)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"written\n"
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(timeout=10) == -signal.SIGKILL
    assert not target.exists()


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "best"
    with atomic_path(target) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_bytes(b"1")
        assert not target.exists()
    assert (target / "weights").read_bytes() == b"1"


def test_mode_and_digest(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "secret.json"
    write_json(target, {"b": 1, "a": 2}, mode=0o600)
    assert target.stat().st_mode & 0o777 == 0o600
    assert sha256_file(target) == hashlib.sha256(target.read_bytes()).hexdigest()
    before = target.read_bytes()
    time.sleep(0.01)
    write_json(target, {"a": 2, "b": 1})
    assert target.read_bytes() == before
