"""Download the open MIMIC demos from PhysioNet, resume what was cut off, verify every file."""

from __future__ import annotations

import errno
import http.client
import logging
import os
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from data.errors import InputError
from data.files import sha256_file, write_text

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

PHYSIONET = {
    "mimic-iv-demo": "https://physionet.org/files/mimic-iv-demo/2.2/",
    "mimic-iii-demo": "https://physionet.org/files/mimiciii-demo/1.4/",
}
SUMS = "SHA256SUMS.txt"
_SUM_LINE = re.compile(r"(?P<sha256>[0-9a-fA-F]{64})\s+\*?(?:\./)?(?P<path>\S.*)")
_CHUNK = 1 << 20
_PART = ".part"


class _TransferCutOffError(Exception):
    """The connection ended before the file did; what arrived is kept."""


class _NothingToResumeError(Exception):
    """The server has no byte beyond what is there."""


@dataclass(frozen=True)
class FetchReport:
    """What a fetch did.

    Attributes:
        folder: Where the files are.
        downloaded: Paths below it that were downloaded, wholly or in part.
        kept: Paths that were there already, with the published checksum.
        received: Bytes that came over the network.
    """

    folder: Path
    downloaded: tuple[str, ...]
    kept: tuple[str, ...]
    received: int


@dataclass(frozen=True)
class _Server:
    base_url: str
    timeout: float
    attempts: int
    pause: float


def fetch(
    name: str,
    out: Path,
    base_url: str | None = None,
    *,
    timeout: float = 30.0,
    attempts: int = 5,
    pause: float = 1.0,
) -> FetchReport:
    """Download a demo's files into `out` and verify each against the published SHA-256.

    A file appears under its name only when its checksum is right; until then it is `NAME.part`,
    from whose end an interrupted download goes on. Files that are there and right are kept. The
    list of checksums is written last: a folder without it is not finished.

    Args:
        name: `mimic-iv-demo` or `mimic-iii-demo`.
        out: The folder to fill.
        base_url: Another place that holds SHA256SUMS.txt and the files; default PhysioNet.
        timeout: Seconds to wait for the server.
        attempts: Tries for each file before giving up.
        pause: Seconds before the second try, doubled for each further one.

    Raises:
        InputError: Unknown name; no network; a file is missing on the server or has another
            checksum; the list of checksums is malformed; `out` cannot be written or is full.
    """
    if name not in PHYSIONET:
        raise InputError(f"unknown dataset {name!r}; choose one of {', '.join(PHYSIONET)}")
    address = (base_url or PHYSIONET[name]).rstrip("/") + "/"
    if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
        raise InputError(f"{address}: not an http(s) address; give one as base_url")
    server = _Server(address, timeout, max(1, attempts), pause)

    listing = _published_sums(server)
    sums = _parse_sums(listing, server.base_url + SUMS)
    downloaded, kept, received = [], [], 0
    for number, (path, sha256) in enumerate(sums.items(), start=1):
        target = out / path
        if target.is_file() and sha256_file(target) == sha256:
            kept.append(path)
            continue
        count = _guard_disk(target, server, path, sha256)
        received += count
        downloaded.append(path)
        logger.info("%d of %d: %s, %.1f MB", number, len(sums), path, count / 1e6)
    write_text(out / SUMS, listing)
    return FetchReport(out, tuple(downloaded), tuple(kept), received)


def _published_sums(server: _Server) -> str:
    try:
        with _open(server, SUMS) as response:
            raw: bytes = response.read()
    except (_TransferCutOffError, http.client.HTTPException, TimeoutError, OSError) as error:
        raise InputError(
            f"{server.base_url}{SUMS}: the transfer broke off ({error}); try again"
        ) from None
    return raw.decode("utf-8", "replace")


def _parse_sums(listing: str, place: str) -> dict[str, str]:
    sums = {}
    for number, line in enumerate(listing.splitlines(), start=1):
        if not line.strip():
            continue
        match = _SUM_LINE.fullmatch(line.strip())
        if match is None:
            raise InputError(
                f"{place}: line {number} is no SHA-256 and file name; check the base address"
            )
        path = match["path"]
        if path.startswith("/") or "\\" in path or ".." in path.split("/"):
            raise InputError(f"{place}: line {number}: {path!r} leads out of the folder")
        sums[path] = match["sha256"].lower()
    if not sums:
        raise InputError(f"{place}: lists no file; check the base address")
    return sums


def _guard_disk(target: Path, server: _Server, path: str, sha256: str) -> int:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return _fetch_file(target, server, path, sha256)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"{target}: cannot be written ({error.strerror}); give another folder"
            ) from None
        raise InputError(
            f"{target}: the disk is full; free some space and run the same command again: it "
            "goes on from what is there"
        ) from None


def _fetch_file(target: Path, server: _Server, path: str, sha256: str) -> int:
    """Download one file until its checksum is right; returns the bytes received."""
    part = target.with_name(target.name + _PART)
    received = 0
    for attempt in range(1, server.attempts + 1):
        resumed = part.is_file() and part.stat().st_size > 0
        if resumed and sha256_file(part) == sha256:
            os.replace(part, target)
            return received
        try:
            received += _transfer(part, server, path)
        except _TransferCutOffError as error:
            if attempt == server.attempts:
                raise InputError(
                    f"{server.base_url}{path}: the transfer broke off {attempt} times ({error}); "
                    "run the same command again: it goes on from what is there"
                ) from None
            time.sleep(server.pause * 2 ** (attempt - 1))
            continue
        except _NothingToResumeError:
            part.unlink()
            continue
        found = sha256_file(part)
        if found == sha256:
            os.replace(part, target)
            return received
        part.unlink()
        if not resumed:
            raise InputError(
                f"{server.base_url}{path}: SHA-256 {found} is not the published {sha256}; the "
                "file was removed: fetch it again, or report it to whoever runs that server"
            )
    raise InputError(
        f"{server.base_url}{path}: never arrived with the published SHA-256 in {server.attempts} "
        "attempts; run the same command again"
    )


def _transfer(part: Path, server: _Server, path: str) -> int:
    """Append to `part` what it lacks; start anew where the server will not resume."""
    have = part.stat().st_size if part.is_file() else 0
    with _open(server, path, start=have) as response:
        resumes = response.status == http.client.PARTIAL_CONTENT
        if resumes and not _continues(response, have):
            raise _TransferCutOffError("the server resumed at another place")
        with part.open("ab" if resumes else "wb") as handle:
            return _copy(response, handle)


def _continues(response: http.client.HTTPResponse, have: int) -> bool:
    span = response.headers.get("Content-Range", "")
    return span.startswith(f"bytes {have}-")


def _copy(response: http.client.HTTPResponse, handle: BinaryIO) -> int:
    expected = response.headers.get("Content-Length")
    received = 0
    try:
        while chunk := response.read(_CHUNK):
            handle.write(chunk)
            received += len(chunk)
    except (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        raise _TransferCutOffError(type(error).__name__) from None
    if expected is not None and received < int(expected):
        raise _TransferCutOffError(f"{received} of {expected} bytes came")
    handle.flush()
    os.fsync(handle.fileno())
    return received


def _open(server: _Server, path: str, *, start: int = 0) -> http.client.HTTPResponse:
    url = server.base_url + urllib.parse.quote(path)
    request = urllib.request.Request(url, headers={"User-Agent": "rayfuse"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=server.timeout)
        return response
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise _NothingToResumeError from None
        if error.code >= http.client.INTERNAL_SERVER_ERROR:
            raise _TransferCutOffError(f"HTTP {error.code}") from None
        raise InputError(
            f"{url}: the server answered {error.code} {error.reason}; check the base address"
        ) from None
    except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise _TransferCutOffError(type(error).__name__) from None
    except urllib.error.URLError as error:
        raise InputError(
            f"{url}: no connection ({error.reason}); check the network, or use the demo tables "
            "that come with the repository in data/demo"
        ) from None
