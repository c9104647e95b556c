"""Where runs are kept (`storage_path`): a folder, or a bucket behind four calls.

A bucket can neither append nor rename. An object appears whole or not at all, so what must be seen
last is put last.
"""

from __future__ import annotations

import difflib
import os
import tempfile
import time
import urllib.parse
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from data.errors import InputError
from data.files import atomic_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_jobs.config import RunConfig

    Result = TypeVar("Result")

SCHEMES = ("s3", "gs")
TRIES = 3
PAUSE_S = 2.0
"""After the first failure; four times as long after the second."""
_CHUNK = 8 * 2**20
# Arrow's names of what no further try mends.
_REFUSED = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT")
_NO_BUCKET = ("NO_SUCH_BUCKET",)
_SECRETS = ("access_key", "secret_key", "session_token", "password")


class Store(Protocol):
    """Objects under names with slashes. Each call retries, then raises InputError."""

    uri: str
    """To show: scheme, bucket and prefix."""

    def put(self, source: Path, name: str) -> None:
        """Copy a file there; it replaces the object of that name."""
        ...

    def get(self, name: str, target: Path) -> None:
        """Copy an object to a file, whole or not at all."""
        ...

    def names(self, prefix: str = "") -> dict[str, int]:
        """Every object below a prefix ("" or "a/b/"), with its bytes."""
        ...

    def remove(self, name: str) -> None:
        """An object or, where the name ends in a slash, all below it; absent is well."""
        ...


def in_bucket(storage_path: str | None) -> bool:
    """Whether it names a bucket and not a folder."""
    return storage_path is not None and "://" in storage_path


def fault(storage_path: str) -> str | None:
    """What is wrong with the form of a storage path, or None."""
    if not in_bucket(storage_path):
        return None if storage_path else "storage_path: empty; leave it out, or name a folder"
    parts = urllib.parse.urlsplit(storage_path)
    form = "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, or a folder"
    if parts.scheme not in SCHEMES:
        close = difflib.get_close_matches(parts.scheme, SCHEMES, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}://?" if close else ""
        return f"storage_path: scheme {parts.scheme!r} is not known: write {form}{hint}"
    if "@" in parts.netloc or set(urllib.parse.parse_qs(parts.query)) & set(_SECRETS):
        # The config is written into every checkpoint.
        return (
            "storage_path: it holds credentials, which would be saved with the run; take them out "
            "and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on every node"
        )
    return None if parts.netloc else f"storage_path: no bucket is named; write {form}"


def below(storage_path: str, name: str) -> str:
    """The path of `name` under a bucket's path, whose options stay."""
    parts = urllib.parse.urlsplit(storage_path)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl()


def open_store(storage_path: str, below: str = "") -> Store:
    """The bucket that a storage path names.

    Args:
        storage_path: s3://BUCKET/PREFIX or gs://..., with Arrow's options after a question mark
            (region, endpoint_override, scheme); credentials come from the environment.
        below: Joined to the prefix: a run's name.

    Raises:
        InputError: It cannot be opened.
    """
    import pyarrow as pa
    from pyarrow import fs

    if wrong := fault(storage_path):
        raise InputError(wrong)
    try:
        files, root = fs.FileSystem.from_uri(storage_path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"storage_path: {storage_path} cannot be opened ({error})") from None
    scheme = urllib.parse.urlsplit(storage_path).scheme
    return Bucket(files, "/".join(filter(None, (root.rstrip("/"), below))), scheme)


class Bucket:
    """A Store on an Arrow filesystem."""

    def __init__(self, files: Any, root: str, scheme: str) -> None:
        self.uri = f"{scheme}://{root}"
        self._files = files
        self._root = root

    def put(self, source: Path, name: str) -> None:
        """Copy a file there; it replaces the object of that name."""

        def copy() -> None:
            with source.open("rb") as handle, self._files.open_output_stream(self._at(name)) as out:
                while chunk := handle.read(_CHUNK):
                    out.write(chunk)

        self._tried("writing", name, copy)

    def get(self, name: str, target: Path) -> None:
        """Copy an object to a file, whole or not at all."""

        def copy() -> None:
            with (
                self._files.open_input_stream(self._at(name)) as stream,
                atomic_path(target) as partial,
                partial.open("wb") as handle,
            ):
                while chunk := stream.read(_CHUNK):
                    handle.write(chunk)

        self._tried("reading", name, copy)

    def names(self, prefix: str = "") -> dict[str, int]:
        """Every object below a prefix ("" or "a/b/"), with its bytes."""
        from pyarrow import fs

        selector = fs.FileSelector(self._at(prefix), recursive=True, allow_not_found=True)
        found = self._tried("listing", prefix, lambda: self._files.get_file_info(selector))
        return {
            info.path.removeprefix(f"{self._root}/"): info.size
            for info in found
            if info.type == fs.FileType.File
        }

    def remove(self, name: str) -> None:
        """An object or, where the name ends in a slash, all below it; absent is well."""
        from pyarrow import fs

        def delete() -> None:
            if name.endswith("/"):
                # With it goes the empty object with which Arrow marks a folder.
                if self._files.get_file_info(self._at(name)).type == fs.FileType.Directory:
                    self._files.delete_dir(self._at(name))
                return
            try:
                self._files.delete_file(self._at(name))
            except FileNotFoundError:
                return

        self._tried("removing", name, delete)

    def _at(self, name: str) -> str:
        return "/".join(filter(None, (self._root, name.rstrip("/"))))

    def _tried(self, what: str, name: str, action: Callable[[], Result]) -> Result:
        for attempt in range(TRIES):
            try:
                return action()
            except FileNotFoundError:
                raise
            except OSError as error:
                if error.errno is not None:
                    # Arrow's errors carry none: this one is of the local disk.
                    raise
                self._refuse(what, name, str(error), last=attempt + 1 == TRIES)
            time.sleep(PAUSE_S * 4**attempt)
        raise AssertionError("the last try returns or raises")

    def _refuse(self, what: str, name: str, error: str, *, last: bool) -> None:
        place = f"storage_path: {what} {self.uri}/{name}"
        if any(each in error for each in _NO_BUCKET):
            bucket = self._root.split("/")[0]
            raise InputError(
                f"storage_path: the bucket {bucket!r} does not exist; create it, or correct "
                "storage_path"
            )
        if any(each in error for each in _REFUSED):
            raise InputError(
                f"{place} is not allowed ({error}); give these credentials the right to list, "
                "read, write and delete there"
            )
        if last:
            raise InputError(
                f"{place} failed {TRIES} times ({error}); once the storage can be reached, the "
                "same command goes on"
            )


def check(config: RunConfig) -> None:
    """Refuse a place for a run that cannot be written, before anything starts.

    Raises:
        InputError: A missing bucket, no right to write, or a folder that cannot be made.
    """
    place = config.storage_path
    if place is not None and in_bucket(place):
        check_store(open_store(place, config.name))
    own = place is None or in_bucket(place)
    check_folder(config.folder.parent, "runs_dir" if own else "storage_path")


def check_store(store: Store) -> None:
    """Write and remove a small object.

    Raises:
        InputError: That fails.
    """
    name = f".probe-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe"
        probe.write_text("rayfuse writes and removes this\n", encoding="utf-8")
        store.put(probe, name)
    store.remove(name)


def check_folder(folder: Path, key: str) -> None:
    """Write a small file, and leave all as it was.

    Permission bits say nothing of root, of a read-only mount or of a network's rules.

    Raises:
        InputError: That fails; `key` is the config key that the message names.
    """
    probe = folder / f".probe-{uuid.uuid4().hex[:8]}"
    try:
        absent = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{key}: {folder} cannot be written ({os.strerror(error.errno or 0)}); set {key} to a "
            "folder that you may write"
        ) from None
    with suppress(OSError):  # another run's folder came there meanwhile
        for each in absent:
            each.rmdir()
