from __future__ import annotations

import errno
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import numpy as np
import pytest

from data.errors import InputError
from data.fetch import PHYSIONET, fetch

if TYPE_CHECKING:
    from collections.abc import Iterator

BIG = np.random.default_rng(0).bytes(300_000)
FILES = {"hosp/labevents.csv.gz": BIG, "LICENSE.txt": b"Open Database License", "empty.csv": b""}


class Mirror:
    """A local stand-in for PhysioNet, with the faults a test asks for."""

    def __init__(self) -> None:
        self.files = dict(FILES)
        self.sums = {name: hashlib.sha256(body).hexdigest() for name, body in FILES.items()}
        self.ranges = True
        self.cut_after: list[int] = []  # bytes after which each next transfer of BIG breaks off
        self.status: dict[str, list[int]] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.url = ""

    def listing(self) -> bytes:
        return "".join(f"{sha} {name}\n" for name, sha in self.sums.items()).encode()


def handler_of(mirror: Mirror) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            name = self.path.removeprefix("/2.2/")
            asked = self.headers.get("Range")
            mirror.requests.append((name, asked))
            body = mirror.listing() if name == "SHA256SUMS.txt" else mirror.files.get(name)
            planned = mirror.status.get(name, [])
            if planned:
                self.send_error(planned.pop(0))
                return
            if body is None:
                self.send_error(404)
                return
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
            if asked and mirror.ranges:
                if start >= len(body):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                body = body[start:]
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if name == "hosp/labevents.csv.gz" and mirror.cut_after:
                body = body[: mirror.cut_after.pop(0)]
                self.close_connection = True
            self.wfile.write(body)

    return Handler


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    mirror = Mirror()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(mirror))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    mirror.url = f"http://127.0.0.1:{server.server_address[1]}/2.2"
    yield mirror
    server.shutdown()
    thread.join()
    server.server_close()


def run(mirror: Mirror, out, **options):
    return fetch("mimic-iv-demo", out, mirror.url, timeout=5, pause=0.01, **options)


def test_everything_arrives_and_is_verified(mirror, tmp_path):
    report = run(mirror, tmp_path / "demo")
    for name, body in FILES.items():
        assert (tmp_path / "demo" / name).read_bytes() == body
    assert set(report.downloaded) == set(FILES)
    assert report.received == sum(map(len, FILES.values()))
    assert (tmp_path / "demo" / "SHA256SUMS.txt").read_bytes() == mirror.listing()
    assert not list((tmp_path / "demo").rglob("*.part"))


def test_what_is_there_is_kept_and_what_is_wrong_is_fetched_again(mirror, tmp_path):
    run(mirror, tmp_path)
    (tmp_path / "LICENSE.txt").write_bytes(b"altered")
    mirror.requests.clear()
    report = run(mirror, tmp_path)
    assert report.downloaded == ("LICENSE.txt",)
    assert len(report.kept) == 2
    assert [name for name, _ in mirror.requests] == ["SHA256SUMS.txt", "LICENSE.txt"]
    assert (tmp_path / "LICENSE.txt").read_bytes() == FILES["LICENSE.txt"]


def test_a_cut_transfer_goes_on_where_it_stopped(mirror, tmp_path):
    mirror.cut_after = [100_000, 50_000]
    report = run(mirror, tmp_path)
    assert (tmp_path / "hosp/labevents.csv.gz").read_bytes() == BIG
    asked = [span for name, span in mirror.requests if name.startswith("hosp")]
    assert asked == [None, "bytes=100000-", "bytes=150000-"]
    assert report.received <= sum(map(len, FILES.values()))


def test_an_abandoned_download_goes_on_in_the_next_run(mirror, tmp_path):
    mirror.cut_after = [100_000, 1_000]
    with pytest.raises(InputError, match=r"broke off 2 times.*goes on from what is there"):
        run(mirror, tmp_path, attempts=2)
    assert not (tmp_path / "hosp/labevents.csv.gz").exists()
    assert not (tmp_path / "SHA256SUMS.txt").exists()
    mirror.requests.clear()
    run(mirror, tmp_path)
    assert ("hosp/labevents.csv.gz", "bytes=101000-") in mirror.requests
    assert (tmp_path / "hosp/labevents.csv.gz").read_bytes() == BIG


def test_a_server_without_ranges_starts_anew(mirror, tmp_path):
    mirror.ranges = False
    mirror.cut_after = [100_000]
    run(mirror, tmp_path)
    assert (tmp_path / "hosp/labevents.csv.gz").read_bytes() == BIG


@pytest.mark.parametrize("extra", [b"", b"and more"])
def test_a_finished_or_overlong_part_is_recognised(mirror, tmp_path, extra):
    part = tmp_path / "hosp" / "labevents.csv.gz.part"
    part.parent.mkdir()
    part.write_bytes(BIG + extra)
    run(mirror, tmp_path)
    assert (tmp_path / "hosp/labevents.csv.gz").read_bytes() == BIG
    fetched = [name for name, _ in mirror.requests if name.startswith("hosp")]
    assert len(fetched) == (0 if not extra else 2)  # the second one after the refused range


def test_a_part_of_other_bytes_is_thrown_away(mirror, tmp_path):
    part = tmp_path / "hosp" / "labevents.csv.gz.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 5_000)
    run(mirror, tmp_path)
    assert (tmp_path / "hosp/labevents.csv.gz").read_bytes() == BIG


def test_a_corrupted_file_is_refused_and_removed(mirror, tmp_path):
    mirror.files["hosp/labevents.csv.gz"] = BIG[:-1] + b"?"
    with pytest.raises(InputError, match=r"labevents\.csv\.gz: SHA-256 \w+ is not the published"):
        run(mirror, tmp_path)
    assert not list((tmp_path / "hosp").iterdir())
    assert not (tmp_path / "SHA256SUMS.txt").exists()


def test_a_missing_file_names_its_address(mirror, tmp_path):
    del mirror.files["LICENSE.txt"]
    with pytest.raises(InputError, match=r"/2\.2/LICENSE\.txt: the server answered 404"):
        run(mirror, tmp_path)


def test_a_server_error_is_tried_again(mirror, tmp_path):
    mirror.status["LICENSE.txt"] = [503, 500]
    assert set(run(mirror, tmp_path).downloaded) == set(FILES)
    mirror.status["SHA256SUMS.txt"] = [503]
    with pytest.raises(InputError, match=r"SHA256SUMS\.txt: the transfer broke off .HTTP 503"):
        run(mirror, tmp_path)


def test_no_network(tmp_path):
    with pytest.raises(InputError, match=r"no connection.*data/demo"):
        fetch("mimic-iv-demo", tmp_path, "http://127.0.0.1:9/", timeout=2)


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        ({"../evil.csv": "0" * 64}, "leads out of the folder"),
        ({"/etc/evil.csv": "0" * 64}, "leads out of the folder"),
        ({"a.csv": "<html>"}, "line 1 is no SHA-256"),
        ({}, "lists no file"),
    ],
)
def test_a_malformed_list_is_refused(mirror, tmp_path, sums, message):
    mirror.sums = sums
    with pytest.raises(InputError, match=message):
        run(mirror, tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_what_came(mirror, tmp_path, monkeypatch, code):
    def full(descriptor: int) -> None:
        raise OSError(code, "no space")

    monkeypatch.setattr("data.fetch.os.fsync", full)
    with pytest.raises(InputError, match="the disk is full; free some space"):
        run(mirror, tmp_path)
    assert not (tmp_path / "SHA256SUMS.txt").exists()
    monkeypatch.undo()
    run(mirror, tmp_path)
    assert (tmp_path / "hosp/labevents.csv.gz").read_bytes() == BIG


def test_a_folder_that_is_a_file(mirror, tmp_path):
    (tmp_path / "demo").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot be written .*give another folder"):
        run(mirror, tmp_path / "demo")
    assert (tmp_path / "demo").read_text() == "in the way"


def test_unknown_names_and_addresses(tmp_path):
    with pytest.raises(InputError, match="unknown dataset 'mimic'; choose one of mimic-iv-demo"):
        fetch("mimic", tmp_path)
    with pytest.raises(InputError, match="not an http"):
        fetch("mimic-iv-demo", tmp_path, "file:///etc/")
    assert all(address.startswith("https://physionet.org/") for address in PHYSIONET.values())
