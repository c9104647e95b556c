"""Which rank lags, why workers were lost, what a recovery took: the bookkeeping, without Ray."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from data.errors import InputError
from fusion.training.metrics_log import MetricsLog, read
from fusion.training.progress import Progress
from ray_jobs import capacity, faults, recovery, supervise, train
from ray_jobs.config import RunConfig, ScalingConfig
from ray_jobs.heartbeat import Beat, Ledger, Status, Watched, innermost
from ray_jobs.runs import RunFolder


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def beat(rank, count, updates=0, stage="step", **options):
    place = {"node": f"n{rank}", "host": f"10.0.0.{rank}", "pid": 40 + rank, "frame": "x.py:1 f"}
    return Beat(rank, 2, **place, count=count, stage=stage, updates=updates, **options)


def test_a_stopped_process_is_the_one_not_heard_of(clock):
    """All wait in the same collective: only one of them sends nothing any more."""
    ledger = Ledger(clock=clock)
    for rank in (0, 1):
        ledger.hear("a", beat(rank, 7, step=3))
    for _ in range(60):
        clock.now += 1
        ledger.hear("a", beat(0, 7, step=3))
    status = ledger.status()
    assert status.quiet == 60
    assert [late.rank for late in status.lagging()[0]] == [1]
    assert status.explain() == (
        "no worker has moved for 60 s: rank 1 (pid 41 on 10.0.0.1) not heard of since epoch 0, "
        "step 3, stage step, in x.py:1 f"
    )


def test_a_hanging_worker_is_the_one_that_is_behind(clock):
    ledger = Ledger(clock=clock)
    for _ in range(30):
        clock.now += 1
        ledger.hear("a", beat(0, 6, stage="data"))
        ledger.hear("a", beat(1, 8))
    assert ledger.status().quiet == 29
    assert "rank 0 (pid 40 on 10.0.0.0) behind the others at" in ledger.status().explain()
    assert ledger.status().overdue(20)
    assert not ledger.status().overdue(30)
    ledger.hear("a", beat(0, 7))
    assert ledger.status().quiet == 0
    clock.now += 5
    ledger.hear("a", beat(0, 8))
    ledger.hear("a", beat(1, 8))
    assert "all at" in ledger.status().explain()


def test_workers_that_never_start(clock):
    ledger = Ledger(clock=clock)
    clock.now += 9
    assert ledger.status().explain() == "no worker has moved for 9 s: none of them has started"
    ledger.turned()
    assert ledger.status().quiet == 0, "Ray's controller moves: it waits for nodes"
    ledger.hear("a", beat(1, 1))
    clock.now += 4
    assert not ledger.status().overdue(3), "workers that start are slow"
    clock.now += 600
    assert ledger.status().overdue(3)
    clock.now -= 600
    assert ledger.status().explain() == "no worker has moved for 4 s: rank 0 never started"


def test_what_was_lost_is_told_to_the_next_workers(clock):
    ledger = Ledger("Ctrl-C", 12, clock=clock)
    ledger.hear("a", beat(0, 1))
    assert ledger.before() == ("Ctrl-C", 12)
    ledger.hear("a", beat(0, 9, updates=14))
    ledger.hear("a", beat(1, 10, updates=15))
    clock.now += 3
    ledger.lost("the process of rank 1 died")
    ledger.lost("rank 0 failed: connection reset")
    clock.now += 20
    ledger.hear("b", beat(0, 1))
    ledger.hear("a", beat(1, 99, updates=99))
    assert ledger.before() == ("the process of rank 1 died", 15), "the first cause counts"
    assert ledger.recovery() == 23
    assert ledger.status().groups == 2
    assert [late.updates for late in ledger.status().beats] == [0], "an old beat is not heard"
    ledger.hear("c", beat(0, 1))
    assert ledger.before() == ("the workers were started again", 0)


def test_a_recovery_is_one_line_with_what_was_replayed(tmp_path):
    folder = RunFolder(tmp_path)
    old = MetricsLog(folder.metrics)
    old.write("event", Progress(), {"event": "start", "updates": 0})
    for updates in (1, 2, 3, 4, 5):
        old.write("train", Progress(updates=updates), {"loss": 1.0})
    with pytest.raises(InputError), recovery.noted(folder):
        raise InputError("hung: rank 1")
    assert recovery.before(folder) == ("hung: rank 1", 5)
    log = MetricsLog(folder.metrics)
    heart = SimpleNamespace(before=lambda: ("hung: rank 1", 0), recovery=lambda: 21.5)
    told = recovery.Recovery(heart, log, folder)
    for updates in (3, 3, 4, 5):
        told.beat(Progress(updates=updates))
    (line,) = [line for line in read(folder.metrics) if line["values"].get("event") == "recovered"]
    assert line["values"] == {
        "event": "recovered",
        "cause": "hung: rank 1",
        "attempt": 2,
        "replayed": 2,
        "seconds": 21.5,
    }
    assert line["step"] == 4, "after the first new step"
    with recovery.noted(folder):
        pass
    assert recovery.before(folder)[0] == "the command was killed", "it left no note"
    assert recovery.before(RunFolder(tmp_path / "other")) is None


def test_the_causes_of_a_failed_group():
    from ray.exceptions import RayActorError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    from ray_jobs.witness import cause_of

    dead = WorkerHealthCheckFailedError("no answer", RayActorError())
    reset = RuntimeError("Connection reset by peer\nby 10.0.0.3")
    both = SimpleNamespace(worker_failures={0: reset, 2: dead})
    assert cause_of(both) == "the process of rank 2 died", "the others fail with it"
    assert cause_of(SimpleNamespace(worker_failures={0: reset})) == (
        "rank 0 failed: Connection reset by peer"
    )
    info = SimpleNamespace(preempted_ranks=[1, 3])
    assert cause_of(SimpleNamespace(preemption_info=info)) == ("a node was taken away (ranks 1, 3)")


class Told:
    """A pulse that answers what the test gives it."""

    def __init__(self, status):
        self._status = status
        self.aborted = threading.Event()

    def status(self):
        return self._status

    def abort(self):
        self.aborted.set()


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (Status((beat(0, 1), beat(1, 1)), {0: 0.1, 1: 9.0}, 9.0), r"hung: .*rank 1 \(pid 41"),
        (Status(fault="part-0.parquet: altered"), r"part-0\.parquet: altered; the same command"),
    ],
)
def test_a_hang_and_a_fault_end_the_run_at_once(tmp_path, monkeypatch, status, said):
    monkeypatch.setattr(supervise, "LOOK_EVERY_S", 0.01)
    config = RunConfig.model_validate(
        {
            "name": "one",
            "task": "mortality",
            "model": {"name": "lstm"},
            "data": {"shards": tmp_path},
            "scaling": {"hang_after_s": 8},
        }
    )
    told = Told(status)
    stop = tmp_path / ".stop"
    fit = supervise.Supervised(
        lambda: told.aborted.wait(60), config, RunFolder(tmp_path), stop, told
    )
    with pytest.raises(InputError, match=said):
        fit.wait()
    assert told.aborted.is_set(), "the workers are ended"


def test_a_draining_node_of_the_run_asks_for_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(capacity, "draining_nodes", lambda: {"n1", "elsewhere"})
    config = RunConfig.model_validate(
        {"name": "x", "task": "mortality", "model": {"name": "lstm"}, "data": {"shards": tmp_path}}
    )
    stop = tmp_path / ".stop"

    def body():
        while not stop.exists():
            time.sleep(0.01)
        return "interrupted"

    told = Told(Status((beat(0, 1), beat(1, 1)), {0: 0.1, 1: 0.1}))
    fit = supervise.Supervised(body, config, RunFolder(tmp_path), stop, told)
    assert fit.wait() == "interrupted"
    assert fit.asked == "drain"


@pytest.mark.parametrize(
    ("workers", "needed", "nodes", "said"),
    [
        (2, {"CPU": 1.0}, [{"CPU": 2.0}], None),
        (2, {"GPU": 1.0}, [{"CPU": 8.0}], "GPU: 2 asked for, 0 there, at most 0 on one node"),
        (1, {"CPU": 8.0}, [{"CPU": 4.0}] * 4, "CPU: 8 asked for, 16 there, at most 4 on one node"),
        (3, {"GPU": 2.0}, [{"GPU": 3.0}] * 2, "room for 2"),
        (1, {"GPU": 1.0}, [], r"0 node\(s\) have room for 0"),
    ],
)
def test_a_shortage_says_what_is_asked_and_what_is_there(workers, needed, nodes, said):
    found = capacity.lacking(workers, needed, nodes)
    if said is None:
        assert found is None
    else:
        with pytest.raises(InputError, match=said):
            raise InputError(found)


@pytest.mark.parametrize(
    ("limit", "refused"), [(None, True), ({"CPU": 1}, True), ({"CPU": 9}, False)]
)
def test_nodes_that_an_autoscaler_may_add_count(monkeypatch, limit, refused):
    import ray

    node = {"NodeID": "a", "Alive": True, "Resources": {"CPU": 1.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    monkeypatch.setattr(capacity, "draining_nodes", set)
    known = ray._private.state.state
    monkeypatch.setattr(known, "get_max_resources_from_cluster_config", lambda: limit)
    scaling = ScalingConfig(num_workers=(2, 8))
    if refused:
        with pytest.raises(InputError, match=r"asks for 2, .* 1 node\(s\) have room for 1"):
            capacity.check(scaling)
    else:
        capacity.check(scaling)


def test_a_watched_stream_beats_before_each_share():
    calls = []
    stream = SimpleNamespace(steps_per_epoch=2, epoch=lambda epoch, start: iter([None, None]))
    assert list(Watched(stream, lambda: calls.append(1)).epoch(0)) == [None, None]
    assert len(calls) == 2


def test_the_innermost_function_of_a_thread():
    asleep = threading.Event()

    def waits_here():
        asleep.wait()

    thread = threading.Thread(target=waits_here)
    thread.start()
    try:
        while thread.ident not in sys._current_frames():
            time.sleep(0.01)
        time.sleep(0.1)
        assert innermost(thread.ident).startswith("threading.py:")
    finally:
        asleep.set()
        thread.join()
    assert innermost(-1) == "no Python code"
    assert json.dumps(innermost(threading.get_ident()))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/d/rank-0000"), "^/d/rank-0000: cannot"),
        (ValueError("I/O error: File too large (os error 27)"), "^/run: .*File too large"),
        (OSError(errno.ENOENT, "No such file", "/d"), None),
        (ValueError("another"), None),
    ],
)
def test_a_full_disk_is_told_from_other_faults(error, said):
    fault = train.full_disk(error, "/run")
    assert fault is None if said is None else re.search(said, fault)


def test_workers_that_are_given_up_stand_nowhere(clock):
    """Else new workers would be asked to leave the node that those before them left."""
    ledger = Ledger(clock=clock)
    ledger.hear("a", beat(0, 4))
    assert ledger.status().nodes == {"n0"}
    ledger.lost("a node was about to be taken away")
    assert ledger.status().nodes == set()
    ledger.hear("b", beat(0, 1, stage="strategy"))
    assert ledger.status().nodes == {"n0"}


def test_a_zombie_has_ended(monkeypatch):
    pid = os.fork()
    if not pid:
        os._exit(0)
    try:
        assert faults.Striker().gone(pid)
    finally:
        os.waitpid(pid, 0)
    monkeypatch.setattr(faults, "GONE_S", 0.2)
    assert not faults.Striker().gone(os.getpid()), "this one lives"


def test_ray_s_trainer_has_its_callbacks_but_for_the_one_of_datasets():
    """The list is Ray's own affair: a version that calls it otherwise is noticed here."""
    from ray.train.torch import TorchTrainer

    from ray_jobs.witness import Trainer

    ours, theirs = (
        [type(each).__name__ for each in kind(print)._create_default_callbacks()]
        for kind in (Trainer, TorchTrainer)
    )
    assert "DatasetsCallback" in theirs
    assert ours == [name for name in theirs if name != "DatasetsCallback"]
