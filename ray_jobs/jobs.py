"""Ray Jobs from a distance: reach a cluster's dashboard, find a run's job, follow it, stop it."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ray.job_submission import JobDetails, JobSubmissionClient

logger = logging.getLogger(__name__)

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
RUNS = "rayfuse_runs"
# Ray's own grace, 3 s, is too short for a step and a checkpoint.
STOP_GRACE = {"RAY_JOB_STOP_SIGNAL": "SIGTERM", "RAY_JOB_STOP_WAIT_TIME_S": "1800"}
"""Variables of a job, which say how `rayfuse runs stop` ends it."""
_REACH_S = 5.0
_ANSWER_S = 20.0
_LOOK_EVERY_S = 0.5
_RECONNECTIONS = 5
_STOPPED = 130


def token() -> str:
    """The token that clients of the cluster show, or "" without any.

    Raises:
        InputError: RAY_AUTH_TOKEN_PATH names no readable file, or an empty one.
    """
    if given := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return given
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if not named and not path.is_file():
        return ""
    try:
        found = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"RAY_AUTH_TOKEN_PATH={path} cannot be read ({type(error).__name__}); name the file "
            "that holds the cluster's token"
        ) from None
    if not found:
        raise InputError(f"{path} is empty; it must hold the cluster's token")
    return found


def connect(address: str | None = None) -> JobSubmissionClient:
    """A client of the dashboard at `address`, RAY_API_SERVER_ADDRESS or 127.0.0.1:8265.

    Raises:
        InputError: Nothing answers there within seconds, it is no Ray dashboard, or it refuses the
            token.
    """
    address = (address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS).rstrip("/")
    if "://" not in address:
        address = f"http://{address}"
    shown = token()
    _check(address, shown)
    from ray.job_submission import JobSubmissionClient

    headers = {"Authorization": f"Bearer {shown}"} if shown else {}
    logging.getLogger("ray.dashboard.modules").setLevel(logging.WARNING)
    with _only(address):
        return JobSubmissionClient(address, headers=headers)


def details(client: JobSubmissionClient, name: str) -> JobDetails:
    """The newest job of the run `name`, or the job of that id.

    Raises:
        InputError: There is none.
    """
    jobs = submitted(client)
    found = [job for job in jobs if name == job.submission_id or name in run_names(job)]
    if not found:
        known = sorted({run for job in jobs for run in run_names(job)})
        raise InputError(
            f"{name}: no job of that run at {client.get_address()}; it has "
            f"{', '.join(known) or 'none'}"
        )
    return max(found, key=lambda job: job.start_time or 0)


def submitted(client: JobSubmissionClient) -> list[JobDetails]:
    """The jobs that `rayfuse submit` sent, oldest first."""
    jobs = [job for job in client.list_jobs() if RUNS in (job.metadata or {})]
    return sorted(jobs, key=lambda job: job.start_time or 0)


def run_names(job: JobDetails) -> list[str]:
    """The runs that a job trains."""
    return str((job.metadata or {}).get(RUNS, "")).split(",")


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], object]) -> int:
    """Write a job's log as it grows, until the job has ended.

    Returns:
        The job's exit code: 0, the driver's own, 1 if it never ran, 130 if it was stopped.

    Raises:
        InputError: The connection was lost and did not come back; the job goes on.
    """
    import aiohttp

    seen, losses = 0, 0
    while True:
        try:
            for text in _tail(client, job, seen):
                write(text)
                seen += len(text)
            break
        except (aiohttp.ClientError, RuntimeError, OSError) as error:
            losses += 1
            if losses > _RECONNECTIONS:
                raise InputError(
                    f"lost the connection to {client.get_address()} ({type(error).__name__}); the "
                    f"job goes on: `rayfuse runs logs {job}`"
                ) from None
            time.sleep(2 * losses)
    return exit_code(_ended(client, job), write)


def exit_code(job: JobDetails, write: Callable[[str], object]) -> int:
    """What a finished job counts as, and why it failed if its log cannot tell."""
    state = job.status.value
    if state == "SUCCEEDED":
        return 0
    if state == "STOPPED":
        return _STOPPED
    if job.driver_exit_code is None:
        write(f"{job.submission_id}: {job.message}\n")
    return job.driver_exit_code or 1


def stop(client: JobSubmissionClient, job: JobDetails, *, now: bool) -> JobDetails:
    """End a running job and wait for that: with a checkpoint, or `now` by a kill.

    Raises:
        InputError: It has ended already.
    """
    name = str(job.submission_id)
    if job.status.is_terminal():
        raise InputError(f"{name} is not running: {job.status.value}")
    if now:
        _kill(client, name)
    else:
        client.stop_job(name)
    return _ended(client, name)


def listing(client: JobSubmissionClient) -> str:
    """A table of the submitted jobs: runs, job, state, start.

    Raises:
        InputError: There is none.
    """
    jobs = submitted(client)
    if not jobs:
        raise InputError(f"{client.get_address()}: nothing was submitted; see `rayfuse submit`")
    rows = [("run", "job", "state", "started (UTC)")]
    for job in jobs:
        started = datetime.fromtimestamp((job.start_time or 0) / 1000, UTC)
        rows.append(
            (
                ",".join(run_names(job)),
                str(job.submission_id),
                job.status.value.lower(),
                f"{started:%Y-%m-%d %H:%M}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _check(address: str, shown: str) -> None:
    """Reach the dashboard and show the token, within seconds."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"--address {address}: write the dashboard's, e.g. {DEFAULT_ADDRESS}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=_REACH_S).close()
    except OSError as error:
        raise InputError(
            f"no Ray dashboard answers at {address} ({error}); start the cluster, or tunnel to its "
            "head (ssh -L 8265:127.0.0.1:8265 HEAD) and name it with --address"
        ) from None
    status = _status(f"{address}/api/jobs/", shown)
    if status in (401, 403):
        fault = "asks for a token, and none is set" if not shown else "refuses this token"
        raise InputError(
            f"the cluster at {address} {fault}; set RAY_AUTH_TOKEN_PATH to a copy of its head "
            "node's token file"
        )
    if status != 200:
        raise InputError(
            f"{address} is no Ray dashboard (GET /api/jobs/ gives {status or 'no answer'}); name "
            "the head node's with --address"
        )
    if shown and _status(f"{address}/api/jobs/", "") == 200:
        logger.warning(
            "%s asks for no token: whoever reaches it can run code; start it with "
            "RAY_AUTH_MODE=token",
            address,
        )


def _status(url: str, shown: str) -> int | None:
    headers = {"Authorization": f"Bearer {shown}"} if shown else {}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=_ANSWER_S
        ) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return None


@contextmanager
def _only(address: str) -> Iterator[None]:
    """Ray's client prefers its variables to the address that it is given."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _tail(client: JobSubmissionClient, job: str, seen: int) -> Iterator[str]:
    """What a job's log holds beyond its first `seen` characters, as it comes."""
    tail: Any = client.tail_job_logs(job)

    async def following() -> str | None:
        text: str | None = await anext(tail, None)
        return text

    with asyncio.Runner() as runner:
        while (text := runner.run(following())) is not None:
            if len(text) > seen:
                yield text[seen:]
            seen = max(0, seen - len(text))


def _ended(client: JobSubmissionClient, job: str) -> JobDetails:
    while True:
        found = client.get_job_info(job)
        if found.status.is_terminal():
            return found
        time.sleep(_LOOK_EVERY_S)


def _kill(client: JobSubmissionClient, job: str) -> None:
    """Kill a job's supervisor, whose watcher then sends SIGKILL to the driver's process group.

    Ray's own stop call cannot: its grace is fixed when a job starts, and ours is long enough for a
    checkpoint.
    """
    from ray.dashboard.modules.job.common import SUPERVISOR_ACTOR_RAY_NAMESPACE

    script = (
        f"import ray; ray.init(namespace={SUPERVISOR_ACTOR_RAY_NAMESPACE!r}, log_to_driver=False); "
        f"ray.kill(ray.get_actor('_ray_internal_job_actor_{job}'))"
    )
    killer = client.submit_job(entrypoint=f"exec python -c {shlex.quote(script)}")
    if _ended(client, killer).status.value != "SUCCEEDED":
        raise InputError(f"{job} could not be killed: {client.get_job_logs(killer)}")
    client.delete_job(killer)
