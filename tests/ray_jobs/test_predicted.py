"""A run predicts the labels that its shards hold, whatever file named them."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING

from data.tasks import task_spec
from ray_jobs import config as run_config
from ray_jobs import evaluate, inference
from ray_jobs.predicted import spec_of
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OWN = ("Pneumonia", "Sepsis", "Stroke")


def _results(rows: list[dict]) -> None:
    for number, row in enumerate(rows):
        row |= {name: None for name in row if name.startswith(("ehr", "cxr", "dicom", "stay"))}
        row |= {"lab_items": ["Sodium"], "lab_units": ["meq/l"], "labs": [130.0 + number]}
        row["labs_available_at"] = row["prediction_time"] - timedelta(hours=1)


def test_labels_of_a_hospital_s_own_file(
    make_shards: Callable, make_run: Callable, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    manifest = make_shards(shards, task="diagnoses", labels=OWN, edit=_results)
    folder = make_run(
        "mltm", shards=shards, task="diagnoses", batches={"labs": {"top": 6}}, name="own-labels"
    )
    trained = inference.load(folder)
    assert trained.model.probe.out_features == len(OWN)
    spec = spec_of(trained.config)
    assert spec.labels == OWN
    assert spec.prevalence == manifest.prevalence["train"]
    assert len(set(spec.prevalence)) > 1
    evaluate.run(folder, split="test")
    scores = json.loads((folder / "eval/test/metrics.json").read_text(encoding="utf-8"))
    assert scores["labels"] == list(OWN)
    assert len(scores["sets"]["partial"]["metrics"]["auroc"]["labels"]) == len(OWN)


def test_labels_of_stays_are_the_task_s_without_any_shards(tmp_path: Path) -> None:
    document = {"name": "x", "task": "phenotyping", "model": {"name": "lstm"}}
    run = run_config.from_document({**document, "data": {"shards": tmp_path}}, place="test")
    assert not RunFolder(run.folder).config.exists()
    assert spec_of(run) == task_spec("phenotyping")
