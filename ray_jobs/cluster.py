"""Reaching Ray: a cluster by its address, or one local instance of our own, quiet and closed.

A local instance keeps sockets, logs and spilled objects in one 0700 scratch folder that is removed
at the end, and asks every client for a token kept in that folder: Ray's ports listen beyond
localhost, so without a token anyone on the network could run code.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

START_ATTEMPTS = 3

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_COLOR_PREFIX": "0",
}


@contextmanager
def connect(address: str | None = None, *, num_cpus: int | None = None) -> Iterator[None]:
    """Use the cluster at `address` (or RAY_ADDRESS), else a local instance for the block.

    An instance this process is already connected to is used as it is.

    Raises:
        InputError: Nothing answers at the address, or it refuses our token.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        with _remote(address):
            yield
        return
    with _local(num_cpus):
        yield


@contextmanager
def _remote(address: str) -> Iterator[None]:
    import ray

    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"no Ray cluster answers at {address} ({error}); unset RAY_ADDRESS to run locally, "
            "or set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH as on its head node"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _local(num_cpus: int | None) -> Iterator[None]:
    import ray

    saved = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
    scratch: Path | None = None
    try:
        scratch = _start(num_cpus)
        yield
    finally:
        ray.shutdown()
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _start(num_cpus: int | None) -> Path:
    """Start the instance and return its scratch folder; a busy machine gets further tries.

    Ray gives its node 30 s to come up, which a machine at full load can exceed.
    """
    for left in reversed(range(START_ATTEMPTS)):
        # Unix socket paths are limited to 107 bytes, so the folder's name is short.
        scratch = Path(tempfile.mkdtemp(prefix="rf-"))
        try:
            _init(num_cpus, scratch)
        except Exception as error:
            shutil.rmtree(scratch, ignore_errors=True)
            if not left or "timed out during startup" not in str(error):
                raise
            logger.info("Ray did not come up in time; trying again")
        else:
            return scratch
    raise AssertionError("the last attempt returns or raises")


def _init(num_cpus: int | None, scratch: Path) -> None:
    import ray

    token = scratch / "auth_token"
    token.touch(mode=0o600)
    token.write_text(_token(), encoding="utf-8")
    # Unset, Ray turns token mode on itself, also where it was imported before this point.
    os.environ.pop("RAY_AUTH_MODE", None)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    _quiet_loggers()
    try:
        ray.init(
            num_cpus=num_cpus,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.ERROR,
            # Ray opens the folder that it is given to everyone; the one around it stays ours alone.
            _temp_dir=str(scratch / "r"),
            object_store_memory=_object_store_bytes(),
        )
    except Exception:
        ray.shutdown()
        raise


@functools.cache
def _token() -> str:
    """One token a process: Ray reads it once and keeps it over later instances."""
    return secrets.token_hex(32)


def _quiet_loggers() -> None:
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _object_store_bytes() -> int:
    """A tenth of memory, at most 2 GiB: shards and images pass through it, cohorts do not."""
    import psutil

    return int(min(2 * 2**30, max(128 * 2**20, psutil.virtual_memory().total // 10)))
