"""Two commands on one run in a bucket are kept apart; a dead one's lease is taken over."""

from __future__ import annotations

import json
import threading

import pytest

from data.errors import InputError
from ray_jobs import lease


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    monkeypatch.setattr(lease, "DEAD_AFTER_S", 5.0)


@pytest.fixture
def folders(tmp_path):
    made = [tmp_path / name for name in ("mine", "yours")]
    for folder in made:
        folder.mkdir()
    return made


def _beat(store):
    return json.loads(store.objects[lease.NAME])["beat"]


def _until(condition):
    waited = threading.Event()
    for _ in range(1200):
        if condition():
            return
        waited.wait(0.05)
    raise AssertionError("it never came")


def test_it_is_renewed_while_held_and_gone_after(memory, folders):
    with lease.held(memory, folders[0]):
        _until(lambda: _beat(memory) >= 2)
    assert memory.objects == {}
    assert list(folders[0].iterdir()) == []


def test_a_second_command_is_refused_while_the_first_lives(memory, folders):
    with (
        lease.held(memory, folders[0]),
        pytest.raises(InputError, match="trained by another command"),
        lease.held(memory, folders[1]),
    ):
        pass
    with lease.held(memory, folders[1]):
        assert lease.NAME in memory.objects


def test_a_killed_command_is_gone_on_from_at_once_in_its_own_folder(memory, folders, monkeypatch):
    lease._write(memory, folders[0], "killed", beat=7)
    monkeypatch.setattr(lease, "DEAD_AFTER_S", 1e9)
    with lease.held(memory, folders[0]):
        assert json.loads(memory.objects[lease.NAME])["token"] != "killed"


def test_elsewhere_a_lease_that_stands_still_is_waited_for(memory, folders, monkeypatch):
    lease._write(memory, folders[0], "killed", beat=7)
    monkeypatch.setattr(lease, "DEAD_AFTER_S", 0.2)
    with lease.held(memory, folders[1]):
        assert json.loads(memory.objects[lease.NAME])["token"] != "killed"


def test_a_command_that_was_taken_over_is_told_and_leaves_the_lease(memory, folders):
    told = threading.Event()
    with lease.held(memory, folders[0], lost=told.set):
        lease._write(memory, folders[1], "yours", beat=0)
        assert told.wait(60)
    assert json.loads(memory.objects[lease.NAME])["token"] == "yours"


def test_a_lost_connection_ends_nothing(memory, folders, caplog):
    with lease.held(memory, folders[0], lost=pytest.fail):
        memory.puts = 0
        _until(lambda: "not renewed" in caplog.text)
        memory.puts = None
        beat = _beat(memory)
        _until(lambda: _beat(memory) > beat)
