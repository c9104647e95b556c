"""`rayfuse chaos` on a cluster of four nodes: every fault is real, every result as undisturbed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    Rows = dict[str, dict[str, str]]

pytestmark = [pytest.mark.slow, pytest.mark.ray]
COLUMNS = ("fault", "ended", "cause", "attempts", "replayed", "seconds", "difference")
STOPPED = ("hang", "nan", "shard", "disk", "driver", "sigterm")
GONE_ON = ("worker", "torn", "drain", "node")
# As they are done: those that take a node come last.
FAULTS = ["worker", "torn", *STOPPED, "drain", "node"]
BY_ITSELF, COMMAND = "went on by itself", "stopped; the same command went on"


def _rows(page: str) -> Rows:
    """The table's rows by fault."""
    found = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == len(COLUMNS):
            found[cells[0]] = dict(zip(COLUMNS, cells, strict=True))
    del found["fault"]
    return found


@pytest.fixture(scope="module")
def rows(start_head: Callable, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """One command, and so one undisturbed run, on four nodes: a lost one leaves enough."""
    folder = tmp_path_factory.mktemp("chaos")
    page = folder / "page.md"
    with start_head(num_cpus=1) as head:
        for _ in range(3):
            head.add_node()
        words = ["chaos", "--address", head.gcs, "--folder", str(folder / "chaos")]
        words += ["--faults", ",".join((*GONE_ON, *STOPPED)), "--out", str(page)]
        done = head.rayfuse(*words, timeout=1800)
        assert done.returncode == 0, done.stderr[-4000:]
    found = _rows(page.read_text(encoding="utf-8"))
    assert list(found) == FAULTS
    return found


def test_what_is_lost_is_gone_on_without(rows: Rows) -> None:
    for row in (rows[fault] for fault in GONE_ON):
        assert row["ended"] == BY_ITSELF, row
        assert row["difference"] == "0", row
        assert int(row["attempts"]) == 2, row
    assert re.search(r"process of rank 1 died", rows["worker"]["cause"])
    assert re.match(r"(lost the node|the process) of rank \d", rows["node"]["cause"])
    assert "about to be taken away" in rows["drain"]["cause"]
    interval = 8
    assert int(rows["worker"]["replayed"]) <= interval
    assert int(rows["node"]["replayed"]) <= interval
    assert int(rows["torn"]["replayed"]) <= 2 * interval
    assert int(rows["drain"]["replayed"]) == 0, "it wrote a checkpoint first"


def test_what_stops_a_run_is_named_and_the_same_command_goes_on(rows: Rows) -> None:
    for row in (rows[fault] for fault in STOPPED):
        assert row["ended"] == COMMAND, row
        assert row["difference"] == "0", row
        assert int(row["attempts"]) >= 2, row
    assert re.search(r"rank 1 \(pid \d+ on", rows["hang"]["cause"])
    assert "NaN or infinite" in rows["nan"]["cause"]
    assert "stay_id" in rows["nan"]["cause"] or "rows" in rows["nan"]["cause"]
    assert ".parquet" in rows["shard"]["cause"]
    assert "cannot be written" in rows["disk"]["cause"]
    assert rows["driver"]["cause"] == "the command was killed"
    assert int(rows["sigterm"]["replayed"]) == 0
