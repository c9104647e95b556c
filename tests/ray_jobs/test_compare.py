"""Runs side by side: paired differences only where rows are the same."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest

from data.errors import InputError
from fusion.metrics.config import EvaluateConfig
from fusion.metrics.subsets import paired_difference
from ray_jobs import evaluate
from ray_jobs import predictions as prediction_file
from ray_jobs.compare import compare_runs
from ray_jobs.report import interval_text
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def folders(make_run: Callable) -> list[Path]:
    made = [make_run("lstm"), make_run("medfuse")]
    for folder in made:
        evaluate.run(folder)
    return made


def _predictions(folder: Path) -> prediction_file.Predictions:
    return prediction_file.read(RunFolder(folder).evaluation("test") / "predictions.parquet")


def test_differences_are_later_minus_first_on_the_same_rows(folders: list[Path]) -> None:
    found = compare_runs(folders)
    first, second = (_predictions(folder) for folder in folders)
    expected = paired_difference(
        second.targets,
        second.probabilities,
        first.probabilities,
        first.subjects,
        config=EvaluateConfig(resamples=40),
    )
    partial, paired = found["differences"]
    assert partial["pair"] == f"{folders[1].name} minus {folders[0].name}"
    assert partial["scores"][0] == interval_text(expected["auroc"]["macro"])
    assert paired["scores"] != partial["scores"]
    assert found["alike"]
    assert [row["run"] for row in found["rows"][:2]] == [folder.name for folder in folders]


def test_average_ranks_are_over_labels_of_runs_on_the_same_rows(folders: list[Path]) -> None:
    """Against a literal count of how many runs score better on each label."""
    found = compare_runs([*folders, folders[0]])["ranks"]
    sets = [
        json.loads((RunFolder(folder).evaluation("test") / "metrics.json").read_text())["sets"]
        for folder in (*folders, folders[0])
    ]
    head = sets[0]["partial"]
    labels = [
        c for c, positives in enumerate(head["positives"]) if 10 <= positives <= head["rows"] - 10
    ]
    assert labels
    for column, metric in enumerate(("auroc", "auprc")):
        for number, row in enumerate(found[:3]):
            total = 0.0
            for c in labels:
                scores = [one["partial"]["metrics"][metric]["labels"][c]["value"] for one in sets]
                better = sum(score > scores[number] for score in scores)
                total += 1 + better + (sum(score == scores[number] for score in scores) - 1) / 2
            assert row["labels"] == len(labels)
            assert float(row["scores"][column]) == pytest.approx(total / len(labels), abs=6e-3)
    assert found[0]["scores"] == found[2]["scores"], "a run ties with itself"


def test_other_rows_have_no_difference(make_run: Callable, folders: list[Path]) -> None:
    def older(rows: list[dict]) -> None:
        for row in rows:
            row["stay_id"] += 1

    other = make_run("lstm", edit=older)
    evaluate.run(other)
    found = compare_runs([folders[0], other])
    assert [row["reason"] for row in found["differences"]] == [
        "the two runs did not score the same rows"
    ]
    assert not found["alike"]
    assert found["ranks"] == []


def test_rows_are_matched_by_key_in_any_order(folders: list[Path], tmp_path: Path) -> None:
    first = _predictions(folders[0])
    backwards = list(range(len(first.keys)))[::-1]
    turned = prediction_file.Predictions(
        keys=first.keys.take(pa.array(backwards)),
        probabilities=first.probabilities[backwards],
        targets=first.targets[backwards],
        labels=first.labels,
        lineage=first.lineage,
    )
    orders = prediction_file.same_rows(first, turned)
    assert orders is not None
    assert (first.probabilities[orders[0]] == turned.probabilities[orders[1]]).all()
    changed = prediction_file.Predictions(
        keys=turned.keys,
        probabilities=turned.probabilities,
        targets=1 - turned.targets,
        labels=turned.labels,
        lineage={},
    )
    assert prediction_file.same_rows(first, changed) is None


def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    with pytest.raises(InputError, match="rayfuse evaluate"):
        prediction_file.read(path)
    path.write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"predictions\.parquet"):
        prediction_file.read(path)
