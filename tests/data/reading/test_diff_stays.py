"""Two real extractions differ by stays: each is named under the rule that removed it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import polars as pl
import pytest

from data import pipeline
from data.check import check
from data.diff import diff
from data.errors import InputError
from data.manifest import Manifest
from data.shards import EXCLUDED, load_excluded
from data.switches import ExtractConfig, Sources

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.ray


def _lose_four(tables: dict) -> None:
    """Stay 1 becomes a minor's, 2 a transfer, 3 loses its diagnoses, 4 is not in the table."""
    tables["patients"][0]["anchor_age"] = "17"
    tables["icustays"][1]["last_careunit"] = "SICU"
    tables["diagnoses_icd"] = [
        row for row in tables["diagnoses_icd"] if row["hadm_id"] != tables["icustays"][2]["hadm_id"]
    ]
    del tables["icustays"][3]


@pytest.fixture
def pair(
    tmp_path: Path, make_hospital: Callable[..., Path], ray_session: None
) -> tuple[Path, Path]:
    """The same twelve patients, and without four of their stays."""
    config = ExtractConfig(partitions=2)
    for name, edit in (("a", None), ("b", _lose_four)):
        raw = make_hospital(tmp_path / "raw" / name, edit=edit)
        sources = Sources(mimic_iv=raw)
        pipeline.extract(sources, "mortality", config, tmp_path / name, preset="corrected")
    return tmp_path / "a", tmp_path / "b"


def test_each_absent_stay_is_under_its_rule(pair: tuple[Path, Path]) -> None:
    text = diff(*pair)
    assert "only in A: 4 (e.g. stay_id 30001, 30002, 30003, 30004)" in text
    for stay, why in (
        (30001, "removed by 'adults'"),
        (30002, "removed by 'no transfer between units'"),
        (30003, "removed by 'diagnoses known'"),
        (30004, "not in its icustays table"),
    ):
        assert f"1 in B {why}: {stay}" in text
    assert len(re.findall(r"^    \d+ in B ", text, re.MULTILINE)) == 4
    back = diff(pair[1], pair[0])
    assert "1 in A removed by" not in back.split("only in B: 4")[0]
    assert "    1 in A removed by 'adults': 30001" in back


def test_the_excluded_stays_are_hashed(pair: tuple[Path, Path]) -> None:
    manifest = Manifest.load(pair[1])
    found = load_excluded(pair[1], manifest)
    assert found["stay_id"].to_list() == [30001, 30002, 30003]
    assert check(pair[1]) == []
    assert not (pair[0] / EXCLUDED).exists()
    found.head(1).write_parquet(pair[1] / EXCLUDED)
    assert any(EXCLUDED in problem and "altered" in problem for problem in check(pair[1]))
    with pytest.raises(InputError, match=EXCLUDED):
        diff(*pair)
    assert pl.read_parquet(pair[1] / EXCLUDED).height == 1
