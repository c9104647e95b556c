"""The report of real evaluations: complete, self-contained, escaped, suppressed, repeatable."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

from data.errors import InputError
from data.flow import FlowStep, Quarantined
from data.manifest import Manifest
from ray_jobs import evaluate, report, report_data
from ray_jobs.inference import load_config
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HOSTILE = '<img src=x onerror="alert(1)">&'


class Page(HTMLParser):
    """Tags with their attributes, text, and whether every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def folders(make_run: Callable) -> list[Path]:
    made = [make_run("drfuse", name="one"), make_run("medfuse", name="two")]
    manifest_folder = load_config(made[0]).data.shards
    manifest = Manifest.load(manifest_folder)
    steps = (("adult", 5000, 4000), ("first stay", 4000, 3997), ("48 h", 3997, 240))
    manifest.model_copy(
        update={
            "flow": tuple(
                FlowStep(rule=rule, unit="stays", rows_in=a, rows_out=b, why=f"why {HOSTILE}")
                for rule, a, b in steps
            ),
            "quarantine": (
                Quarantined(place="chartevents", reason="no number", count=77, examples=("4711",)),
            ),
            "counters": {"fahrenheit": 12345, "inches": 4},
        }
    ).write(manifest_folder)
    for folder in made:
        environment = {
            "packages": {"torch": "2.15"},
            "gpus": [],
            "hostname": "ward7",
            "git": HOSTILE,
        }
        RunFolder(folder).environment.write_text(json.dumps(environment))
        evaluate.run(folder)
    return made


@pytest.fixture(scope="module")
def single(folders: list[Path]) -> str:
    out = report.write_report(folders[:1], folders[0] / "report.html")
    return out.read_text(encoding="utf-8")


def test_every_section_is_there_with_its_figures(single: str) -> None:
    page = Page(single)
    assert not page.open
    for heading in (
        "Scores",
        "Each label",
        "Calibration and training",
        "Subgroups",
        "When X-rays are missing",
        "Attention by disease",
        "Representations",
        "Cohort flow",
        "Data",
        "Compute and lineage",
    ):
        assert f"<h3>{heading}</h3>" in single
    drawn = [attributes for tag, attributes in page.tags if tag == "svg" and "role" in attributes]
    titles = [attributes["aria-label"] for attributes in drawn]
    assert {"Losses", "Validation auroc", "Calibration, all labels"} <= set(titles)
    assert "Shared and distinct representations (t-SNE)" in titles
    assert "Data: mimic-iv-2.2, from source tables without the mark" in page.words
    assert "wall time, validation included 0 min 29 s" in page.words
    assert "Septicemia" in page.words


def test_scores_shown_are_those_of_the_evaluation(folders: list[Path], single: str) -> None:
    metrics = report.read_metrics(folders[0], "test")
    words = Page(single).words
    for name in ("partial", "paired", "ehr_only"):
        macro = metrics["sets"][name]["metrics"]["auroc"]["macro"]
        assert report.interval_text(macro) in words
    assert re.search(r"\d\.\d{3} \(\d\.\d{3} to \d\.\d{3}\)", words)


def test_nothing_is_fetched_and_nothing_runs(single: str) -> None:
    page = Page(single)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "iframe", "object", "embed", "img", "form", "base"}
    assert not re.search(r"(?:https?:)?//\w", single), "no address of any kind"
    assert "@import" not in single
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("href", "src"):
            assert attributes.get(name, "#").startswith(("#", "data:,"))
    assert len(single) < 800_000


def test_ids_are_unique_and_references_hold(folders: list[Path]) -> None:
    html = report.write_report(folders, folders[0] / "both.html").read_text(encoding="utf-8")
    ids = [attributes["id"] for _, attributes in Page(html).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html))
    for pair in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html):
        assert (pair[0] or pair[1]) in ids


def test_hostile_text_stays_text(single: str) -> None:
    assert HOSTILE not in single
    assert HOSTILE in "".join(Page(single).text)


def test_no_ids_of_patients_and_no_machine(single: str, folders: list[Path]) -> None:
    assert "4711" not in single
    assert "ward7" not in single
    assert str(folders[0].parent) not in single
    assert not re.search(r"dicom-\d|\b1\d{4}\b", Page(single).words.replace("12,345", ""))


def test_small_cells_are_not_shown(single: str) -> None:
    page = Page(single)
    assert "4,000 " in page.words
    assert "< 10 excluded" in page.words
    assert "3,997" not in page.words
    assert "about 240" in page.words
    assert "inches < 10" in page.words
    assert "fahrenheit 12,345" in page.words


def test_labels_of_fewer_than_ten_are_not_scored(make_run: Callable, tmp_path: Path) -> None:
    def rare(rows: list[dict]) -> None:
        seen = 0
        for row in rows:
            row["labels"][3] = 0.0
            if row["split"] == "test" and seen < 9:
                row["labels"][3], seen = 1.0, seen + 1
            row["age"] = 85.0 if row["split"] == "test" and seen == 3 else 50.0

    folder = make_run("lstm", edit=rare)
    evaluate.run(folder)
    html = report.write_report([folder], tmp_path / "r.html").read_text(encoding="utf-8")
    row = re.search(r">Cardiac dysrhythmias</td>.*?</tr>", html, re.DOTALL)[0]
    assert "fewer than 10 positives or negatives" in row
    assert not re.search(r"0\.\d\d", row)
    shown = re.search(r">Shock</td>.*?</tr>", html, re.DOTALL)[0]
    assert re.search(r"0\.\d\d\d \(", shown)
    oldest = re.search(r">age \[80, \+\)</td>.*?</tr>", html, re.DOTALL)[0]
    assert "n &lt; 10" in oldest
    assert not re.search(r"0\.\d\d\d", oldest)


def test_rounding_hides_what_a_subtraction_would_show() -> None:
    steps = [
        FlowStep(rule="a", unit="stays", rows_in=1000, rows_out=900, why=""),
        FlowStep(rule="b", unit="stays", rows_in=900, rows_out=897, why=""),
        FlowStep(rule="c", unit="stays", rows_in=897, rows_out=847, why=""),
    ]
    manifest = Manifest.model_construct(flow=tuple(steps))
    (chain,) = report_data.flow(manifest)
    remaining = [step["remaining"] for step in chain["steps"]]
    assert remaining == ["900", "about 900", "about 850"]
    assert [step["removed"] for step in chain["steps"]] == ["100", "< 10", "50"]


def test_twice_the_same_bytes(folders: list[Path], tmp_path: Path) -> None:
    first = report.write_report(folders, tmp_path / "a.html").read_bytes()
    assert report.write_report(folders, tmp_path / "b.html").read_bytes() == first


def test_synthetic_and_mixed_are_said_in_a_banner(make_run: Callable, tmp_path: Path) -> None:
    folder = make_run("lstm", edit=lambda rows: None)
    shards = load_config(folder).data.shards
    Manifest.load(shards).model_copy(
        update={"release": "mimic-iv-2.2-synthetic", "preset": "code"}
    ).write(shards)
    evaluate.run(folder)
    html = report.write_report([folder], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "SYNTHETIC DATA" in html
    assert "without the mark" not in html
    assert "shards of preset code under a run of preset corrected" in html


def test_shards_that_are_gone_are_said_so(make_run: Callable, tmp_path: Path) -> None:
    folder = make_run("lstm", edit=lambda rows: None)
    evaluate.run(folder)
    (load_config(folder).data.shards / "manifest.json").unlink()
    html = report.write_report([folder], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "no longer where the run found them" in html


def test_a_run_that_was_not_evaluated_is_named(make_run: Callable, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rayfuse evaluate"):
        report.write_report([make_run("lstm")], tmp_path / "r.html")
    with pytest.raises(InputError, match="no run given"):
        report.write_report([], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("model", "task", "sets"),
    [
        ("resnet34", "radiology", {"partial"}),
        ("medfuse", "mortality", {"partial", "paired", "ehr_only"}),
    ],
)
def test_other_tasks(
    make_run: Callable, tmp_path: Path, model: str, task: str, sets: set[str]
) -> None:
    folder = make_run(model, task=task, shards=tmp_path / "shards", rows=400)
    found = evaluate.run(folder)
    assert set(found["sets"]) == sets
    assert "types" in found["sets"]["partial"]["metrics"]["auroc"]
    html = report.write_report([folder], tmp_path / "r.html").read_text(encoding="utf-8")
    assert f"<dd>{task}</dd>" in html
    assert ("When X-rays are missing" in html) == ("ehr_only" in sets)


def test_counts_of_texts_are_a_fact_and_no_loss() -> None:
    values = {"focal": 0.2, "loss": 0.2, "text_texts": 30.0, "text_tokens": 900.0}
    line = {"kind": "train", "epoch": 0, "time": 1.0, "values": values}
    (losses,) = report_data.curves([line, {**line, "epoch": 1}], "salt")
    assert "train focal" in losses
    assert "text_" not in losses
