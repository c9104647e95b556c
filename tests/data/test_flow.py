"""Flows and quarantines of partitions add up; a manifest survives the disk or says why not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from data.errors import InputError
from data.flow import FlowStep, Quarantined, merge_flows, merge_quarantine
from data.manifest import FILE_NAME, Manifest, ShardFile

if TYPE_CHECKING:
    from pathlib import Path


def _step(rule: str, rows_in: int, rows_out: int, unit: str = "stays") -> FlowStep:
    return FlowStep(rule=rule, unit=unit, rows_in=rows_in, rows_out=rows_out, why="because")


def test_flows_add_up_rule_by_rule_in_first_order() -> None:
    merged = merge_flows(
        [
            [_step("transfers", 10, 8), _step("adults", 8, 7)],
            [_step("transfers", 5, 5), _step("adults", 5, 1), _step("adults", 2, 2, "rows")],
        ]
    )
    found = [(step.rule, step.unit, step.rows_in, step.rows_out) for step in merged]
    assert found == [
        ("transfers", "stays", 15, 13),
        ("adults", "stays", 13, 8),
        ("adults", "rows", 2, 2),
    ]


def test_quarantines_add_up_and_keep_five_examples() -> None:
    parts = [
        [Quarantined(place="images", reason="truncated", count=4, examples=("a", "b", "c"))],
        [Quarantined(place="images", reason="truncated", count=3, examples=("d", "e", "f"))],
    ]
    (merged,) = merge_quarantine(parts)
    assert merged.count == 7
    assert merged.examples == ("a", "b", "c", "d", "e")


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        task="mortality",
        labels=("In-hospital mortality",),
        preset="corrected",
        release="mimic-iv-2.2",
        sources={"mimic_iv": "0"},
        config={},
        config_hash="0",
        code_version="0",
        files=(ShardFile(name="shards/part-00000.parquet", rows=3, sha256="0"),),
        splits={"train": 3},
        prevalence={"train": (0.5,)},
        overlap={"train": {"ehr": 3}},
        flow=(_step("adults", 4, 3),),
    )


def test_a_manifest_round_trips_and_its_digest_names_it(manifest: Manifest, tmp_path: Path) -> None:
    manifest.write(tmp_path)
    loaded = Manifest.load(tmp_path)
    assert loaded == manifest
    assert loaded.digest == manifest.digest
    assert manifest.model_copy(update={"preset": "code"}).digest != manifest.digest


def test_a_folder_without_a_manifest_holds_no_cohort(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rayfuse data extract"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    "change", [{"schema_version": 99}, {"files": "none"}, {"unheard_of": 1}, {"task": None}]
)
def test_an_altered_manifest_is_refused(
    manifest: Manifest, tmp_path: Path, change: dict[str, object]
) -> None:
    manifest.write(tmp_path)
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}), encoding="utf-8")
    with pytest.raises(InputError, match="extract again"):
        Manifest.load(tmp_path)
