"""A command made fit for a cluster: what is sent, and what is refused before anything is."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import typer.main
import yaml

from data.errors import InputError
from ray_jobs import config as run_config
from ray_jobs import jobs, submit
from ray_jobs.cli import app, main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GOOD = "0123456789abcdef"
STORAGE = Path("/mnt/shared")


@pytest.fixture
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    document = {
        "name": "mine",
        "task": "mortality",
        "preset": "code",
        "model": {"name": "lstm"},
        "data": {"shards": "shards/ihm"},
        "init_from": {"encoder": "runs/before"},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def _prepare(*words: str, storage: Path | None = STORAGE) -> submit.Command:
    return submit.prepare(typer.main.get_command(app), list(words), storage)


def _sent(command: submit.Command, tmp_path: Path) -> list[run_config.RunConfig]:
    (tmp_path / "sent.yaml").write_text(command.texts["run.yaml"], encoding="utf-8")
    return run_config.load(tmp_path / "sent.yaml")


def test_what_is_sent_is_the_run_that_was_read_here(run_yaml: Path, tmp_path: Path) -> None:
    command = _prepare("train", "./mine.yaml", "train.epochs=7", "--fork", "optim.lr=0.5")
    assert command.entrypoint == "exec python -m ray_jobs train run.yaml --fork"
    (sent,) = _sent(command, tmp_path)
    (here,) = run_config.load(run_yaml, ["train.epochs=7", "optim.lr=0.5"])
    paths = {
        "runs_dir": STORAGE / "runs",
        "data.shards": STORAGE / "shards/ihm",
        "init_from.encoder": STORAGE / "runs/before",
    }
    assert dict(submit.paths_of(sent)) == paths
    assert sent.train.epochs == 7
    moved = {"runs_dir": here.runs_dir, "init_from": here.init_from, "data": here.data}
    assert sent.model_copy(update=moved) == here, "nothing but paths differs"


def test_stages_are_sent_together(run_yaml: Path, tmp_path: Path) -> None:
    document = yaml.safe_load(run_yaml.read_text()) | {
        "stages": [{"name": "one"}, {"name": "two", "seed": 3}]
    }
    run_yaml.write_text(yaml.safe_dump(document), encoding="utf-8")
    command = _prepare("train", "mine.yaml")
    assert [run.name for run in _sent(command, tmp_path)] == ["one", "two"]
    assert command.name == "two"


def test_relative_paths_are_refused_by_key(run_yaml: Path) -> None:
    with pytest.raises(InputError) as refused:
        _prepare("train", "mine.yaml", storage=None)
    for line in ("runs_dir: runs", "data.shards: shards/ihm", "init_from.encoder: runs/before"):
        assert line in str(refused.value)
    assert "--storage" in str(refused.value)
    absolute = ["runs_dir=/s/runs", "data.shards=/s/ihm", "init_from.encoder=/s/before"]
    assert _prepare("train", "mine.yaml", *absolute, storage=None).runs[0].runs_dir.is_absolute()


def test_other_verbs_are_checked_too() -> None:
    command = _prepare("evaluate", "runs/mine", "--split", "val")
    assert command.words == ("evaluate", "/mnt/shared/runs/mine", "--split", "val")
    assert command.name == "evaluate"
    nested = _prepare("data", "describe", "/mnt/other/shards", storage=None)
    assert nested.words == ("data", "describe", "/mnt/other/shards")
    with pytest.raises(InputError, match=r"runs/mine(.|\n)*--storage"):
        _prepare("report", "runs/mine", storage=None)
    with pytest.raises(InputError, match="runs/demo would lie in the job's own folder"):
        _prepare("demo")


def test_a_wrong_command_is_refused_here(run_yaml: Path) -> None:
    with pytest.raises(InputError, match=r"submit trane: unknown command; one of .*train"):
        _prepare("trane", "mine.yaml")
    with pytest.raises(InputError, match="unknown command"):
        _prepare("submit", "train", "mine.yaml")
    with pytest.raises(InputError, match=r"train\.epoch: unknown key; did you mean 'epochs'"):
        _prepare("train", "mine.yaml", "train.epoch=3")
    with pytest.raises(Exception, match="No such option"):
        _prepare("train", "mine.yaml", "--frok")


@pytest.fixture
def dashboard() -> Iterator[str]:
    """Something that asks for a token as Ray's dashboard does."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown = self.headers.get("Authorization")
            code = 401 if shown is None else 200 if shown == f"Bearer {GOOD}" else 403
            body = json.dumps({"ray_version": "2.60.0"} if "version" in self.path else []).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def use_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str | None], None]:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)

    def use(text: str | None) -> None:
        if text is not None:
            (tmp_path / "token").write_text(text, encoding="utf-8")
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))

    return use


def test_the_right_token_connects_to_the_address_given(
    dashboard: str, use_token: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_token(f"{GOOD}\n")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    client = jobs.connect(dashboard)
    assert client.get_address() == dashboard
    assert jobs.submitted(client) == []


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "asks for a token, and none is set; set RAY_AUTH_TOKEN_PATH"),
        ("f" * 16, "refuses this token; set RAY_AUTH_TOKEN_PATH"),
        ("", "is empty; it must hold the cluster's token"),
    ],
)
def test_a_missing_or_wrong_token(
    dashboard: str, use_token: Callable, token: str | None, said: str
) -> None:
    use_token(token)
    with pytest.raises(InputError) as refused:
        jobs.connect(dashboard)
    assert said in str(refused.value)
    if token:
        assert token not in str(refused.value)


def test_an_address_without_a_cluster(use_token: Callable, dashboard: str) -> None:
    use_token(GOOD)
    with pytest.raises(InputError, match=r"no Ray dashboard answers at http://127\.0\.0\.1:1 "):
        jobs.connect("127.0.0.1:1")
    with pytest.raises(InputError, match="write the dashboard's"):
        jobs.connect("ray://10.0.0.1:10001")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(InputError, match=r"is no Ray dashboard \(GET /api/jobs/ gives 404\)"):
        jobs.connect(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


def test_the_command_line_says_so_in_one_line(
    run_yaml: Path,
    use_token: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_token(GOOD)
    words = ["--address", "http://127.0.0.1:1", "--storage", "/mnt/x", "train", "mine.yaml"]
    monkeypatch.setattr(sys, "argv", ["rayfuse", "submit", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("rayfuse: no Ray dashboard answers")
    assert told.count("\n") == 1


class _Cluster:
    """Remembers what was submitted, as Ray's client reports it."""

    def __init__(self) -> None:
        self.jobs: list[SimpleNamespace] = []

    def get_address(self) -> str:
        return "there"

    def list_jobs(self) -> list[SimpleNamespace]:
        return self.jobs

    def submit_job(self, **request: object) -> str:
        self.jobs.append(
            SimpleNamespace(
                **request,
                status=SimpleNamespace(is_terminal=lambda: False, value="RUNNING"),
                start_time=len(self.jobs),
            )
        )
        return str(request["submission_id"])


def test_a_run_has_one_job_at_a_time_and_every_job_its_own_id(run_yaml: Path) -> None:
    cluster = _Cluster()
    command = _prepare("train", "mine.yaml")
    assert submit.send(command, cluster, code=False) == "mine@1"
    sent = cluster.jobs[0]
    assert sent.runtime_env["env_vars"] == jobs.STOP_GRACE
    assert not Path(sent.runtime_env["working_dir"]).exists(), "the archive does not stay"
    with pytest.raises(InputError, match="mine is running already as mine@1"):
        submit.send(command, cluster, code=False)
    sent.status = SimpleNamespace(is_terminal=lambda: True, value="FAILED")
    assert submit.send(command, cluster, code=False) == "mine@2"
    assert jobs.details(cluster, "mine").submission_id == "mine@2"
    assert jobs.details(cluster, "mine@1").submission_id == "mine@1"
    with pytest.raises(InputError, match="yours: no job of that run at there; it has mine"):
        jobs.details(cluster, "yours")
