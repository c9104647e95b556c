"""The command line: frozen verbs, help that teaches, faults as one line and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ray_jobs.cli import app, main
from ray_jobs.supervise import Terminated

ROOT = Path(__file__).parents[2]
VERBS = {
    "chaos",
    "data",
    "demo",
    "doctor",
    "evaluate",
    "export",
    "import-weights",
    "plan",
    "predict",
    "report",
    "runs",
    "submit",
    "train",
    "tune",
}
DATA_VERBS = {"synth", "fetch", "plan", "stage", "extract", "embed", "describe", "check", "diff"}
RUNS_VERBS = {"gc", "logs", "ls", "pull", "stop"}


def _rayfuse(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ray_jobs", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "RAYFUSE_LOG": "WARNING"},
    )


def test_the_verbs_are_frozen() -> None:
    import typer.main

    group = typer.main.get_command(app)
    assert set(group.commands) == VERBS
    assert set(group.commands["data"].commands) == DATA_VERBS
    assert set(group.commands["runs"].commands) == RUNS_VERBS


@pytest.mark.parametrize(
    "words",
    [[verb] for verb in sorted(VERBS)]
    + [["data", verb] for verb in sorted(DATA_VERBS)]
    + [["runs", verb] for verb in sorted(RUNS_VERBS)],
)
def test_every_verb_explains_itself(words: list[str]) -> None:
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0
    assert len(result.output.split()) > 20


def test_a_fault_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    finished = _rayfuse("train", str(tmp_path / "absent.yaml"))
    assert finished.returncode == 2
    assert finished.stderr.startswith("rayfuse: ")
    assert "absent.yaml" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (KeyboardInterrupt("lstm: checkpoint written"), "rayfuse: lstm: checkpoint written\n"),
        (KeyboardInterrupt(), "rayfuse: interrupted; the same command continues where it was\n"),
        (Terminated("lstm: SIGTERM"), "rayfuse: lstm: SIGTERM\n"),
    ],
)
def test_ctrl_c_says_what_is_left(
    raised: BaseException,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(folder: Path) -> str:
        raise raised

    monkeypatch.setattr("ray_jobs.runs.listing", interrupted)
    monkeypatch.setattr(sys, "argv", ["rayfuse", "runs", "ls"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == (143 if isinstance(raised, Terminated) else 130)
    assert capsys.readouterr().err == said


def test_doctor_fails_when_a_run_could_not_start(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"name: x\ntask: mortality\nmodel: {{name: lstm}}\ndata: {{shards: {tmp_path}/none}}\n",
        encoding="utf-8",
    )
    finished = _rayfuse("doctor", str(config))
    assert finished.returncode == 1
    assert "FAIL  shards" in finished.stdout
    assert "rayfuse data extract" in finished.stdout
    assert "ok    python" in finished.stdout
