"""Evaluation of real models on real shards: sets, sweep, files, repeatability."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

from data.errors import InputError
from fusion.metrics.config import EvaluateConfig
from fusion.metrics.decisions import best_thresholds
from fusion.metrics.subsets import score_set
from ray_jobs import evaluate, inference
from ray_jobs import predictions as prediction_file
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def drfuse(make_run: Callable) -> Path:
    folder = make_run("drfuse")
    evaluate.run(folder)
    return folder


def _metrics(folder: Path, split: str = "test") -> dict:
    return json.loads((RunFolder(folder).evaluation(split) / "metrics.json").read_text())


def _predictions(folder: Path) -> prediction_file.Predictions:
    return prediction_file.read(RunFolder(folder).evaluation("test") / "predictions.parquet")


def test_predictions_hold_the_split_row_by_row_and_only_for_the_owner(drfuse: Path) -> None:
    path = RunFolder(drfuse).evaluation("test") / "predictions.parquet"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    table = pq.read_table(path)
    assert table.column_names == [*prediction_file.KEYS, "probabilities", "labels"]
    assert set(table["split"].to_pylist()) == {"test"}
    config = inference.load_config(drfuse)
    shards = pa.concat_tables(
        [pq.read_table(part) for part in sorted((config.data.shards / "shards").iterdir())]
    )
    truth = {row["stay_id"]: row for row in shards.to_pylist() if row["split"] == "test"}
    assert len(truth) == table.num_rows
    for row in table.to_pylist():
        expected = truth[row["stay_id"]]
        assert row["labels"] == expected["labels"]
        assert row["has_cxr"] == (expected["cxr"] is not None)
        assert (row["subject_id"], row["age"]) == (expected["subject_id"], expected["age"])
        assert len(row["probabilities"]) == 25
        assert all(0 < p < 1 for p in row["probabilities"])


def test_metrics_are_those_of_the_predictions(drfuse: Path) -> None:
    found, predicted = _metrics(drfuse), _predictions(drfuse)
    config = EvaluateConfig(resamples=40)
    for name, member in (("partial", slice(None)), ("paired", predicted.has_cxr)):
        expected = score_set(
            predicted.targets[member],
            predicted.probabilities[member],
            predicted.subjects[member],
            config=config,
            label_types=found["label_types"],
        )
        assert found["sets"][name] == json.loads(json.dumps(expected))
    macro = found["sets"]["partial"]["metrics"]["auroc"]["macro"]["value"]
    assert macro == pytest.approx(roc_auc_score(predicted.targets, predicted.probabilities))
    assert set(found["sets"]["partial"]["metrics"]["auroc"]["types"]) == {
        "acute",
        "mixed",
        "chronic",
    }
    women = predicted.sex == "F"
    subgroup = found["subgroups"]["partial"]["sex"]["F"]
    assert subgroup["rows"] == int(women.sum())
    assert sum(one["rows"] for one in found["subgroups"]["partial"]["age"].values()) <= 240


def test_decisions_are_scored_at_half_and_at_thresholds_of_the_validation_split(
    make_run: Callable,
) -> None:
    folder = make_run("lstm", evaluate={"resamples": 10, "tune_thresholds": True})
    evaluate.run(folder)
    found, predicted = _metrics(folder)["sets"]["partial"]["decisions"], _predictions(folder)
    trained = inference.load(folder)
    val = inference.predict(trained, inference.open_split(trained, "val"))
    tuned = best_thresholds(val.targets, val.probabilities)
    assert found["tuned"]["thresholds"] == pytest.approx(tuned)
    assert found["tuned"]["thresholds"] != found["half"]["thresholds"]
    for kind, cut in (("half", 0.5), ("tuned", tuned)):
        for mean in ("macro", "weighted", "micro"):
            precision, recall, f1, _ = precision_recall_fscore_support(
                predicted.targets, predicted.probabilities >= cut, average=mean, zero_division=0
            )
            name = "f1" if mean == "macro" else f"{mean}_f1"
            assert found[kind]["means"][name]["value"] == pytest.approx(f1), (kind, mean)
            if mean == "macro":
                assert found[kind]["means"]["precision"]["value"] == pytest.approx(precision)
                assert found[kind]["means"]["recall"]["value"] == pytest.approx(recall)
    evaluate.run(folder, split="val")
    assert set(_metrics(folder, "val")["sets"]["partial"]["decisions"]) == {"half"}


def test_lineage_names_everything(drfuse: Path) -> None:
    lineage = _metrics(drfuse)["lineage"]
    assert lineage["model"] == "drfuse"
    assert (lineage["preset"], lineage["task"]) == ("corrected", "phenotyping_48h")
    assert (lineage["synthetic"], lineage["allow_mixed"]) == (False, False)
    assert len(lineage["manifest"]) == len(lineage["weights"]) == 64
    assert _predictions(drfuse).lineage == lineage


def test_a_synthetic_release_is_marked(make_run: Callable, drfuse: Path) -> None:
    config = inference.load_config(drfuse)
    from data.manifest import Manifest

    manifest = Manifest.load(config.data.shards)
    assert not evaluate.is_synthetic(manifest)
    marked = manifest.model_copy(update={"release": "mimic-iv-2.2-synthetic"})
    assert evaluate.is_synthetic(marked)


def test_the_sweep_runs_from_the_paired_set_to_ehr_only(drfuse: Path) -> None:
    found = _metrics(drfuse)
    points = found["missingness"]
    assert [point["share"] for point in points] == [0.0, 0.25, 0.5, 0.75, 1.0]
    rows = points[0]["rows"]
    assert [point["withheld"] for point in points] == [
        round(s * rows) for s in (0, 0.25, 0.5, 0.75, 1)
    ]
    for end, name in ((0, "paired"), (-1, "ehr_only")):
        for metric in ("auroc", "auprc", "brier"):
            expected = found["sets"][name]["metrics"][metric]["macro"]
            assert points[end]["metrics"][metric]["macro"] == expected
    assert points[0]["metrics"] != points[-1]["metrics"]


@pytest.mark.parametrize("missing", ["not_encoded", "zero_image"])
def test_withholding_equals_shards_without_those_images(make_run: Callable, missing: str) -> None:
    """A mixed sweep point is what the model says of a cohort that lacks those very images."""
    folder = make_run("medfuse", options={"missing_image": missing})
    trained = inference.load(folder)
    stream = inference.open_split(trained, "test")
    without = inference.predict(trained, stream, withhold=True)
    whole = inference.predict(trained, stream)
    lost = whole.rows[stream.reader.has_cxr[whole.rows]][::2]
    mixed = np.where(np.isin(whole.rows, lost)[:, None], without.probabilities, whole.probabilities)

    def drop(rows: list[dict]) -> None:
        for index in lost:
            rows[index]["cxr"] = None
            rows[index]["cxr_labels"] = None

    literal = inference.load(make_run("medfuse", edit=drop, options={"missing_image": missing}))
    other = inference.open_split(literal, "test")
    # The same normaliser: the train split is untouched.
    expected = inference.predict(replace(trained, config=literal.config), other)
    np.testing.assert_array_equal(expected.rows, whole.rows)
    np.testing.assert_allclose(mixed, expected.probabilities, atol=2e-6)
    assert np.abs(without.probabilities - whole.probabilities).max() > 1e-4


def test_images_are_withheld_nested_and_the_same_for_every_run() -> None:
    rows = np.arange(500)
    order = inference.withholding_order(rows, 3)
    np.testing.assert_array_equal(order[100:200], inference.withholding_order(rows[100:200], 3))
    assert not np.array_equal(order, inference.withholding_order(rows, 4))
    assert 0.4 < order.mean() < 0.6


def test_attention_and_representations_are_kept(drfuse: Path) -> None:
    attention = _metrics(drfuse)["attention"]["attention"]
    weights = np.array(attention["mean"])
    assert weights.shape == (25, 3)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    assert attention["rows"] == _metrics(drfuse)["sets"]["paired"]["rows"]
    path = RunFolder(drfuse).evaluation("test") / "features.npz"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with np.load(path, allow_pickle=False) as kept:
        assert {"ehr_shared", "cxr_shared", "ehr_distinct", "cxr_distinct", "row"} <= set(kept)
        assert kept["ehr_shared"].shape == kept["cxr_shared"].shape
        assert len(kept["row"]) == attention["rows"]


def test_twice_the_same_bytes(drfuse: Path) -> None:
    folder = RunFolder(drfuse).evaluation("test")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {"metrics.json", "predictions.parquet", "features.npz"}
    evaluate.run(drfuse)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_model_of_one_modality_has_no_sweep(make_run: Callable) -> None:
    found = evaluate.run(make_run("lstm"), split="val")
    assert set(found["sets"]) == {"partial", "paired"}
    assert found["missingness"] == []
    assert found["lineage"]["split"] == "val"


def test_faults_are_named(make_run: Callable, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run folder"):
        evaluate.run(tmp_path)
    folder = make_run("lstm")
    next((folder / "best").rglob("*.safetensors")).unlink()
    with pytest.raises(InputError, match=r"rank-0000\.safetensors: missing"):
        evaluate.run(folder)
    assert not (folder / "eval").exists()


def test_other_shards_than_those_of_training_are_refused(make_run: Callable) -> None:
    folder = make_run("lstm")
    meta = json.loads((folder / "best" / "meta.json").read_text())
    meta["lineage"] = {"manifest": "0" * 64}
    (folder / "best" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=r"not the shards that .* was trained on"):
        evaluate.run(folder)
    assert not (folder / "eval").exists()
