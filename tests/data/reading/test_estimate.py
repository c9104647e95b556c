"""Estimates follow sizes and formats, before anything is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from data import estimate as estimating
from data.estimate import choose_partitions, csv_bytes, estimate, plan_extraction
from data.stage import stage
from data.switches import Sources

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def _sparse(path: Path, size: int) -> Path:
    with path.open("wb") as handle:
        handle.truncate(size)
    return path


def test_partitions_grow_with_the_inflated_size(tmp_path: Path) -> None:
    small = {"chartevents": _sparse(tmp_path / "a.csv.gz", 2 << 20)}
    large = {"chartevents": _sparse(tmp_path / "b.csv.gz", 3 << 30)}
    plain = {"chartevents": _sparse(tmp_path / "c.csv", 30 << 30)}
    assert choose_partitions(small) == 1
    assert choose_partitions(large) == choose_partitions(plain) > 40
    assert choose_partitions(small, images=377_000) == 76


def test_an_estimate_scales_and_says_what_is_lacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"chartevents": _sparse(tmp_path / "c.csv.gz", 1 << 30)}
    twice = {**files, "labevents": _sparse(tmp_path / "l.csv.gz", 1 << 30)}
    one, two = (estimate(each, "mimic-iv-3.1", out=tmp_path / "new/out") for each in (files, twice))
    assert two.seconds == pytest.approx(2 * one.seconds)
    assert two.output == pytest.approx(2 * one.output, abs=2)
    assert "mimic-iv-3.1" in one.text()
    monkeypatch.setattr(estimating.shutil, "disk_usage", lambda _: _Usage)
    poor = estimate(files, "mimic-iv-3.1", out=tmp_path)
    assert any(lack.startswith("disk") for lack in poor.lacks)
    assert "NOT ENOUGH  disk" in poor.text()


class _Usage:
    free = 1000


def test_a_plan_reads_headers_only(tmp_path: Path, make_hospital: Callable[..., Path]) -> None:
    folder = make_hospital(tmp_path / "raw")
    path = folder / "icu" / "chartevents.csv.gz"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 500])
    plan = plan_extraction(Sources(mimic_iv=folder), "mortality", tmp_path / "out")
    assert plan.release == "mimic-iv-2.x"
    assert plan.csv_bytes == csv_bytes(
        folder / place
        for place in (
            "icu/chartevents.csv.gz",
            "hosp/labevents.csv.gz",
            "icu/outputevents.csv.gz",
        )
    )
    path.write_bytes(content)
    stage(folder, tmp_path / "staged", partitions=3)
    staged = plan_extraction(Sources(mimic_iv=tmp_path / "staged"), "mortality", tmp_path / "out")
    assert staged.partitions == 3
    assert staged.release == "mimic-iv-2.x, staged"
