"""Reports in a real headless Chromium at desktop and phone width; pictures go to shots/."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "shots"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]
# Reports its layout by its title, because the report itself runs no script.
PROBE = """<!DOCTYPE html><meta charset="utf-8"><title>waiting</title>
<style>body{margin:0}iframe{border:0;width:%dpx;height:900px}</style>
<iframe src="report.html"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, width = page.documentElement.clientWidth;
  page.querySelectorAll("details").forEach(part => { part.open = true; });
  const boxed = node => node.closest(".scroll, svg");
  const wide = [...page.body.querySelectorAll("*")].filter(node => !boxed(node.parentElement)
    && node.getBoundingClientRect().right > width + 1).map(node => node.tagName);
  const small = [...page.querySelectorAll("p, td, dd, summary")].filter(node =>
    parseFloat(getComputedStyle(node).fontSize) < 11).length;
  document.title = JSON.stringify({width, scroll: page.documentElement.scrollWidth,
    height: page.documentElement.scrollHeight, wide, small,
    tall: Math.max(...[...page.querySelectorAll("tbody tr")].map(
      row => row.getBoundingClientRect().height)),
    figures: [...page.querySelectorAll("figure svg")].filter(
      svg => svg.getBoundingClientRect().height < 60).length});
};</script>"""


class Requests(http.server.SimpleHTTPRequestHandler):
    """A local server that remembers what is asked for."""

    asked: list[str]

    def log_message(self, format: str, *parts: object) -> None:
        self.asked.append(self.path)


@pytest.fixture(scope="module", params=["report", "search"])
def kind(request: pytest.FixtureRequest) -> str:
    """Of a run, or of a search: the example that the docs keep."""
    return str(request.param)


@pytest.fixture(scope="module")
def site(
    kind: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple]:
    folder = tmp_path_factory.mktemp("site")
    example = ROOT / "docs" / "examples" / "drfuse-paper-search.html"
    page = example if kind == "search" else request.getfixturevalue("report_file")
    shutil.copy(page, folder / "report.html")
    asked: list[str] = []
    handler = type("Handler", (Requests,), {"asked": asked})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *parts: handler(*parts, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def _chromium(profile: Path, *flags: str) -> str:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *flags]
    environment = {**os.environ, "HOME": str(profile)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True, env=environment
    )
    return done.stdout


def _layout(site: tuple, profile: Path, width: int) -> dict:

    folder, address, _ = site
    (folder / f"probe-{width}.html").write_text(PROBE % width, encoding="utf-8")
    dumped = _chromium(
        profile,
        "--window-size=1400,1000",
        "--virtual-time-budget=5000",
        "--dump-dom",
        f"{address}/probe-{width}.html",
    )
    title = re.search(r"<title>(.*?)</title>", dumped)[1]
    return json.loads(title)


@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_readable_without_scrolling_sideways(site: tuple, tmp_path: Path, width: int) -> None:
    layout = _layout(site, tmp_path, width)
    assert layout["width"] == width
    assert layout["scroll"] <= width
    assert layout["wide"] == []
    assert layout["small"] == 0
    assert layout["tall"] < 200, "a squeezed cell makes its row tall"
    assert layout["figures"] == 0


def test_the_probe_sees_what_is_too_wide(site: tuple, tmp_path: Path) -> None:
    folder = site[0]
    whole = (folder / "report.html").read_text(encoding="utf-8")
    wide = whole.replace("<main>", '<main><div style="width:900px">wide</div>', 1)
    (folder / "report.html").write_text(wide, encoding="utf-8")
    try:
        layout = _layout(site, tmp_path, 390)
    finally:
        (folder / "report.html").write_text(whole, encoding="utf-8")
    assert layout["scroll"] > 390
    assert "DIV" in layout["wide"]


def test_nothing_but_the_file_is_asked_for(site: tuple, tmp_path: Path) -> None:
    _, address, asked = site
    asked.clear()
    _chromium(tmp_path, "--virtual-time-budget=5000", "--dump-dom", f"{address}/report.html")
    assert asked == ["/report.html"]


@pytest.mark.parametrize(("name", "width"), [("desktop", 1280), ("phone", 390)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures(
    site: tuple, kind: str, tmp_path: Path, name: str, width: int, scheme: str
) -> None:
    """A page as high as the report in a frame of the width: Chromium's window has a least width."""
    folder, address, _ = site
    SHOTS.mkdir(exist_ok=True)
    target = SHOTS / f"{kind}-{name}-{scheme}.png"
    target.unlink(missing_ok=True)
    high = min(_layout(site, tmp_path, width)["height"] + 40, 12_000)
    frame = f'<iframe src="report.html" style="border:0;width:{width}px;height:{high}px"></iframe>'
    (folder / "frame.html").write_text(
        f'<!DOCTYPE html><body style="margin:0">{frame}', encoding="utf-8"
    )
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    _chromium(
        tmp_path,
        *dark,
        f"--window-size={max(width, 500)},{high}",
        f"--screenshot={target}",
        f"{address}/frame.html",
    )
    with Image.open(target) as picture:
        page = picture.convert("L").crop((0, 0, width, 600))
        page.load()
    shades = page.getextrema()
    assert shades[1] - shades[0] > 150, "text and paper differ"
    middle = sorted(page.tobytes())[len(page.tobytes()) // 2]
    assert (middle < 80) if scheme == "dark" else (middle > 200)
