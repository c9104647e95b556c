"""The texts of describe and diff say what the manifests hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data.describe import describe
from data.diff import diff
from data.flow import FlowStep, Quarantined
from data.ontology import disagreement, tie_decided

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from data.manifest import Manifest


def _step(rule: str, rows_in: int, rows_out: int) -> FlowStep:
    return FlowStep(rule=rule, unit="stays", rows_in=rows_in, rows_out=rows_out, why="why")


def test_describe_tells_cohort_flow_labels_and_what_was_set_aside(
    tmp_path: Path, make_shards: Callable[..., Manifest]
) -> None:
    manifest = make_shards(tmp_path, rows=200, image_size=32).model_copy(
        update={
            "flow": (_step("adults", 1234, 1200), _step("long enough", 1200, 1195)),
            "quarantine": (Quarantined(place="images", reason="empty", count=3, examples=("d1",)),),
            "counters": {"weight converted": 41, "height converted": 0},
        }
    )
    manifest.write(tmp_path)
    text = describe(tmp_path)
    lines = {line.split("  ")[1].strip(): line for line in text.splitlines() if "  " in line}
    assert "mortality from mimic-iv-2.2, preset corrected" in text
    assert lines["adults"].split()[-3:] == ["1,234", "1,200", "34"]
    assert lines["long enough"].split()[-1] == "<10"
    assert f"{manifest.prevalence['train'][0]:.3f}" in lines["In-hospital mortality"]
    assert "images: empty: 3 (e.g. d1)" in text
    assert "weight converted: 41" in text
    assert "height converted" not in text


def test_describe_prints_the_disagreement_of_the_maps(
    tmp_path: Path, make_shards: Callable[..., Manifest]
) -> None:
    make_shards(tmp_path, rows=20, task="phenotyping_48h", image_size=32)
    text = describe(tmp_path)
    differing = disagreement("resolved", "forward_last").codes.height
    assert differing > 1000
    assert f"{differing:,} ICD-10 codes get other labels under `forward_last`" in text
    assert "| 20 | Pleurisy" in text
    for other in ("forward_last", "backward_first"):
        by_label = disagreement("resolved", other).by_label.row(6, named=True)
        cells = [by_label[name] for name in ("codes_a", "codes_b", "both", "only_a", "only_b")]
        start = text.index(f"by label under `resolved` and `{other}`")
        assert f"| {' | '.join(map(str, cells))} |" in text[start:].split("\n| 7 |")[0]
    decided = tie_decided()
    assert decided.height > 10
    assert all(f"| {code} | " in text for code in decided["icd_code"])
    assert text.count("the tie rule of `resolved`") == 1


def test_diff_names_switch_rule_and_stays(
    tmp_path: Path, make_shards: Callable[..., Manifest]
) -> None:
    def older_labels(rows: list[dict[str, Any]]) -> None:
        del rows[38:]
        rows[0]["labels"] = [1.0 - rows[0]["labels"][0]]

    first = make_shards(tmp_path / "a", rows=40, image_size=32)
    second = make_shards(tmp_path / "b", rows=40, image_size=32, edit=older_labels)
    config = {**first.config, "age": "anchor"}
    first.model_copy(update={"flow": (_step("adults", 50, 40),)}).write(tmp_path / "a")
    changed = {"flow": (_step("adults", 50, 38),), "config": config}
    second.model_copy(update=changed).write(tmp_path / "b")
    text = diff(tmp_path / "a", tmp_path / "b")
    assert any(
        line.split() == ["switch", "age", "admission", "anchor"] for line in text.splitlines()
    )
    assert "B loses 2 stays more at 'adults'" in text
    assert "only in A: 2 (e.g. stay_id 30038, 30039)" in text
    assert "only in B: 0" in text
    assert "1 with another labels" in text
    assert "0 with another ehr\n" in text


def test_diff_of_a_cohort_with_itself(tmp_path: Path, make_shards: Callable[..., Manifest]) -> None:
    make_shards(tmp_path, rows=12, image_size=32)
    text = diff(tmp_path, tmp_path)
    assert "the same sources, release, task and switches" in text
    assert "no rule removes another number" in text
    assert "only in A: 0" in text
