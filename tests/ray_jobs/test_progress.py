"""What a user sees of a run, in a terminal and elsewhere; what reaches workers and comes back."""

from __future__ import annotations

import io
import os
import signal
import time
from pathlib import Path

import pytest

from data.errors import InputError
from fusion.training.metrics_log import MetricsLog
from fusion.training.progress import Progress
from ray_jobs import capacity, supervise
from ray_jobs.progress import Follower, Reporter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def lines(tmp_path):
    """Metrics as a run writes them, read as they come."""
    log = MetricsLog(tmp_path)
    follower = Follower(tmp_path)

    def made():
        log.write("event", Progress(), {"event": "start", "updates": 4, "world": 2})
        values = {"loss": 0.25, "of": 60}
        log.write("train", Progress(epoch=1, updates=5), values)
        first = follower.new_lines()
        log.rotate()
        log.write("val", Progress(epoch=2, updates=6), {"auroc": 0.75, "loss": 0.3, "best": True})
        log.write("train", Progress(epoch=2, updates=7), {**values, "loss": float("nan")})
        second = follower.new_lines()
        assert follower.new_lines() == []
        return first, second

    return made()


def test_a_line_still_being_written_is_left_for_later(tmp_path):
    part = tmp_path / "attempt-1" / "part-00001.jsonl"
    part.parent.mkdir()
    part.write_text("")
    follower = Follower(tmp_path)
    part.write_text('{"kind": "eve')
    assert follower.new_lines() == []
    part.write_text('{"kind": "event"}\n')
    assert follower.new_lines() == [{"kind": "event"}]


def test_what_was_cut_of_the_texts_is_said_once():
    def train(epoch, **counts):
        values = {"loss": 0.5, "of": 8, **{f"text_{name}": float(n) for name, n in counts.items()}}
        return {"kind": "train", "epoch": epoch, "step": 1, "values": values}

    def val(epoch):
        return {"kind": "val", "epoch": epoch, "values": {"f1": 0.5, "best": False}}

    stream = io.StringIO()
    reporter = Reporter("notes", 2, stream)
    first = {"texts": 30, "tokens": 900, "notes_cut": 20, "labs_cut": 0, "tokens_cut": 600}
    second = {"texts": 10, "tokens": 300, "notes_cut": 10, "labs_cut": 4, "tokens_cut": 200}
    reporter.show([train(0, **first, empty=0), train(0, **second, empty=10), val(1)])
    reporter.show([train(1, **first, empty=0), val(2)])
    said = [line for line in stream.getvalue().splitlines() if "texts:" in line]
    assert said == [
        "notes: texts: the note cut in 75%, results in 10% of them, 40% of all tokens by "
        "model.max_length; no text in 20% of rows"
    ]
    plain = io.StringIO()
    Reporter("series", 2, plain).show([train(0), val(1)])
    assert "texts" not in plain.getvalue()


def test_computed_and_damaged_outputs_of_a_frozen_encoder_are_said():
    stream = io.StringIO()
    reporter = Reporter("demo", 20, stream)
    for computed, damaged in ((0, 0), (5, 0), (2, 1)):
        values = {"event": "embeddings", "computed": computed, "damaged": damaged}
        reporter.show([{"kind": "event", "epoch": 0, "step": 0, "values": values}])
    assert stream.getvalue().splitlines() == [
        "demo: outputs of the frozen encoder: 5 files computed",
        "demo: outputs of the frozen encoder: 2 files computed, 1 of them damaged",
    ]


def test_plain_lines_where_there_is_no_terminal(lines):
    stream = io.StringIO()
    reporter = Reporter("demo", 20, stream)
    for part in lines:
        reporter.show(part)
    reporter.close()
    assert stream.getvalue().splitlines() == [
        "demo: goes on from step 4 on 2 worker(s)",
        "demo: epoch 2/20  loss 0.2500  val auroc 0.7500  best so far",
    ], "training steps come every half minute, validations always"


def test_one_live_line_in_a_terminal(lines):
    stream = Terminal()
    reporter = Reporter("demo", 20, stream)
    for part in lines:
        reporter.show(part)
    live = stream.getvalue().split("\r\x1b[2K")
    assert "demo: epoch 2/20  step 5/60  loss 0.2500" in live
    assert live[-1].startswith(
        "demo: epoch 3/20  step 7/60  loss not finite  best val auroc 0.7500"
    )
    assert "\n" not in live[-1]
    reporter.close()
    assert stream.getvalue().endswith("\x1b[2K")


def test_paths_reach_workers_absolute():
    value = {"a": Path("x/y"), "b": [Path("/z"), 1], "c": {"d": None}}
    assert supervise.absolute_paths(value) == {
        "a": str(Path.cwd() / "x/y"),
        "b": ["/z", 1],
        "c": {"d": None},
    }


def test_an_input_error_of_a_worker_comes_back_as_one(tmp_path):
    class FailedError(Exception):
        worker_failures = {1: RuntimeError("wrapped")}  # noqa: RUF012

    FailedError.worker_failures[1].__cause__ = InputError("shard 3 was altered")

    def body():
        raise FailedError

    supervised = _supervised(tmp_path, body)
    with pytest.raises(InputError, match="shard 3 was altered"):
        supervised.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_for_a_stop_and_the_second_takes_it(tmp_path, number):
    stop = tmp_path / ".stop"
    before = signal.getsignal(number)
    seen = []

    def obeys():
        os.kill(os.getpid(), number)
        while not stop.exists():
            time.sleep(0.01)
        seen.append(supervise.stop_flag(stop, 0)())
        seen.append(supervise.stop_flag(stop, 1)())
        return "interrupted"

    supervised = _supervised(tmp_path, obeys)
    assert supervised.wait() == "interrupted"
    assert seen == [True, False], "worker 0 looks"
    assert supervised.asked == {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]
    stop.unlink()

    def ignores():
        os.kill(os.getpid(), number)
        while not stop.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        time.sleep(5)

    with pytest.raises(KeyboardInterrupt, match="at once"):
        _supervised(tmp_path, ignores).wait()
    assert signal.getsignal(number) is before


def test_lost_nodes_are_waited_for_until_a_deadline(tmp_path, monkeypatch, capsys):
    """A cluster that shrank: told once, then given up, for Ray itself would wait for ever."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": False, "Resources": {"CPU": 8.0}}])
    monkeypatch.setattr(capacity, "draining_nodes", set)
    monkeypatch.setattr(supervise, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(supervise, "COUNT_NODES_EVERY_S", 0.02)
    with pytest.raises(InputError, match=r"room for 0 .*none came in 0\.2 s.*the same command"):
        _supervised(tmp_path, lambda: time.sleep(5), wait_for_nodes_s=0.2).wait()
    assert capsys.readouterr().err.count("waiting for nodes") == 1


def _supervised(tmp_path, body, pulse=None, **scaling):
    from ray_jobs.config import RunConfig
    from ray_jobs.runs import RunFolder

    config = RunConfig.model_validate(
        {
            "name": "one",
            "task": "mortality",
            "model": {"name": "lstm"},
            "data": {"shards": tmp_path},
            "scaling": scaling,
        }
    )
    return supervise.Supervised(body, config, RunFolder(tmp_path), tmp_path / ".stop", pulse)
