"""Fixtures of all tests: one Ray instance a session, synthetic shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """The session's one local Ray instance, as `rayfuse` starts it."""
    from ray_jobs import cluster

    with cluster.connect(num_cpus=4):
        yield
