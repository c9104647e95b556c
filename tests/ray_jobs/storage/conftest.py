"""A store in memory that remembers what was done to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.errors import InputError


class Memory:
    """A Store. `log` holds ("put", name, bytes) and ("remove", name); puts fail after `puts`."""

    uri = "memory://run"

    def __init__(self, objects=None, puts=None):
        self.objects = dict(objects or {})
        self.log = []
        self.puts = puts

    def put(self, source, name):
        if self.puts == 0:
            raise InputError("storage_path: the network is gone")
        if self.puts is not None:
            self.puts -= 1
        self.objects[name] = Path(source).read_bytes()
        self.log.append(("put", name, self.objects[name]))

    def get(self, name, target):
        if name not in self.objects:
            raise FileNotFoundError(2, "no such object", name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.objects[name])

    def names(self, prefix=""):
        return {name: len(data) for name, data in self.objects.items() if name.startswith(prefix)}

    def remove(self, name):
        below = name.endswith("/")
        for one in list(self.objects):
            if one == name or (below and one.startswith(name)):
                del self.objects[one]
        self.log.append(("remove", name))

    def after(self, count):
        """The store as it was after the first `count` calls."""
        past = Memory()
        for what, name, *data in self.log[:count]:
            if what == "put":
                past.objects[name] = data[0]
            else:
                past.remove(name)
        return past


@pytest.fixture
def memory():
    """A Store in memory."""
    return Memory()
