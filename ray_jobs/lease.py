"""Who trains a run that is kept in a bucket: an object that its command renews.

A bucket of any make has no lock, so this is advice: it keeps two commands apart unless they start
within the same second or the holder is cut off from the bucket for longer than DEAD_AFTER_S. No
clock is read but this machine's own, and only for how long the object has stood still.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import threading
import time
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import InputError
from data.files import write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ray_jobs.storage import Store

NAME = "lease.json"
LOCAL = ".lease.json"
RENEW_S = 20.0
DEAD_AFTER_S = 90.0

logger = logging.getLogger(__name__)


def _end_with_a_checkpoint() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def held(
    store: Store, folder: Path, lost: Callable[[], None] = _end_with_a_checkpoint
) -> Iterator[None]:
    """Hold a run's lease; the caller holds the lock of its local folder.

    A lease that this folder's last command left behind is taken over at once, for the lock says
    that it is dead; another's only once it has stood still for DEAD_AFTER_S, which is waited for.

    Args:
        store: The run's.
        folder: The run's.
        lost: Called on a thread once another command is seen to have taken the lease over.

    Raises:
        InputError: Another command trains the run.
    """
    mine = uuid.uuid4().hex
    _wait(store, folder)
    _write(store, folder, mine, beat=0)
    if (seen := _read(store)) is None or seen["token"] != mine:
        raise _taken(store)
    done = threading.Event()
    renewing = threading.Thread(
        target=_renew, args=(store, folder, mine, done, lost), daemon=True, name="lease"
    )
    renewing.start()
    try:
        yield
    finally:
        done.set()
        renewing.join()
        _release(store, folder, mine)


def _release(store: Store, folder: Path, mine: str) -> None:
    try:
        if (seen := _read(store)) is not None and seen["token"] == mine:
            store.remove(NAME)
    except InputError as error:
        # Kept beside the run, so that the next command here need not wait.
        logger.warning("the run's lease was not given back: %s", error)
        return
    (folder / LOCAL).unlink(missing_ok=True)


def _wait(store: Store, folder: Path) -> None:
    """Until the lease is free, ours, or its holder dead."""
    first = _read(store)
    if first is None or first["token"] == _own(folder):
        return
    logger.info("%s is leased to another command; waiting whether it still lives", store.uri)
    end = time.monotonic() + DEAD_AFTER_S
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, RENEW_S / 2))
        now = _read(store)
        if now is None:
            return
        if now != first:
            raise _taken(store)


def _renew(
    store: Store, folder: Path, mine: str, done: threading.Event, lost: Callable[[], None]
) -> None:
    beat = 0
    while not done.wait(RENEW_S):
        try:
            seen = _read(store)
            if seen is not None and seen["token"] != mine:
                logger.error("%s: another command took the run over; this one ends", store.uri)
                lost()
                return
            beat += 1
            _write(store, folder, mine, beat)
        except InputError as error:
            # Training may go on without the bucket until its next checkpoint.
            logger.warning("the run's lease was not renewed: %s", error)


def _taken(store: Store) -> InputError:
    return InputError(
        f"{store.uri} is being trained by another command; wait for it, end it, or choose another "
        "name"
    )


def _own(folder: Path) -> str | None:
    path = folder / LOCAL
    return json.loads(path.read_text(encoding="utf-8"))["token"] if path.is_file() else None


def _read(store: Store) -> dict[str, Any] | None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / NAME
        try:
            store.get(NAME, copy)
        except FileNotFoundError:
            return None
        found: dict[str, Any] = json.loads(copy.read_text(encoding="utf-8"))
        return found


def _write(store: Store, folder: Path, token: str, beat: int) -> None:
    write_json(folder / LOCAL, {"token": token, "beat": beat})
    store.put(folder / LOCAL, NAME)
