"""`rayfuse evaluate`: a run's best weights on a split, with intervals, into eval/<split>/."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from data.files import PRIVATE, atomic_path, write_json
from data.tasks import task_spec
from ray_jobs import predictions as prediction_file
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from data.manifest import Manifest
    from fusion.metrics.config import EvaluateConfig
    from fusion.training.predict import Predictions as Raw
    from ray_jobs.config import RunConfig
    from ray_jobs.inference import Trained
    from ray_jobs.predictions import Predictions

FORMAT = 2
"""1: without decisions."""
METRICS_FILE = "metrics.json"
FEATURES_FILE = "features.npz"
SAMPLED_ROWS = 250
"""Rows whose representations are kept for the report's map."""

_log = logging.getLogger(__name__)


def run(run_folder: Path, *, split: str | None = None) -> dict[str, Any]:
    """Predict a split and score it.

    Writes eval/<split>/predictions.parquet (0600), metrics.json, and for a model that names its
    representations features.npz (0600, a sample of rows). All three are the same twice.

    Args:
        run_folder: runs/<name> with its best weights.
        split: train, val or test; default the config's.

    Returns:
        What metrics.json holds.

    Raises:
        InputError: No such run, no weights, no shards, or the split has no rows.
    """
    from ray_jobs import inference

    trained = inference.load(run_folder)
    config = trained.config
    split = split or config.evaluate.split
    stream = inference.open_split(trained, split)
    _log.info("%s: predicting the %s split", config.name, split)
    raw = inference.predict(trained, stream, features=True)
    keys = stream.reader.keys().take(raw.rows)
    manifest = stream.reader.manifest
    predicted = prediction_file.Predictions(
        keys=keys.select(prediction_file.KEYS),
        probabilities=raw.probabilities,
        targets=raw.targets,
        labels=manifest.labels,
        lineage=_lineage(trained, manifest, split),
    )
    withheld = None
    if {"ehr", "cxr"} <= set(trained.model.modalities) and predicted.has_cxr.any():
        _log.info("%s: predicting again without X-rays", config.name)
        withheld = inference.predict(trained, stream, withhold=True).probabilities
    stream.close()
    tuned = (
        _tuned_thresholds(trained) if config.evaluate.tune_thresholds and split != "val" else None
    )
    _log.info("%s: %d resamples of each set", config.name, config.evaluate.resamples)
    metrics = _metrics(config, predicted, raw, withheld, tuned)
    folder = RunFolder(run_folder).evaluation(split)
    prediction_file.write(folder / prediction_file.FILE_NAME, predicted)
    _write_features(folder / FEATURES_FILE, raw, predicted.has_cxr, config.evaluate.seed)
    write_json(folder / METRICS_FILE, metrics)
    return metrics


def is_synthetic(manifest: Manifest) -> bool:
    """Whether the cohort comes from the synthetic hospital."""
    return "synthetic" in manifest.release.lower()


def _lineage(trained: Trained, manifest: Manifest, split: str) -> dict[str, Any]:
    config = trained.config
    return {
        "run": config.name,
        "model": config.model.name,  # type: ignore[attr-defined]
        "preset": config.preset,
        "task": config.task,
        "split": split,
        "release": manifest.release,
        "synthetic": is_synthetic(manifest),
        "manifest": manifest.digest,
        "manifest_preset": manifest.preset,
        "allow_mixed": config.data.allow_mixed,
        "weights": trained.meta["sha256"],
        "seed": config.seed,
    }


def score_predictions(config: RunConfig, predicted: Predictions) -> dict[str, Any]:
    """What metrics.json holds of predictions that no model is behind: no sweep, no attention."""
    return _metrics(config, predicted, None, None)


def _tuned_thresholds(trained: Trained) -> NDArray[np.float64]:
    """[C] of the validation split."""
    from fusion.metrics.decisions import best_thresholds
    from ray_jobs import inference

    stream = inference.open_split(trained, "val")
    _log.info("%s: predicting the val split, to choose thresholds", trained.config.name)
    raw = inference.predict(trained, stream)
    stream.close()
    return best_thresholds(raw.targets, raw.probabilities)


def _metrics(
    config: RunConfig,
    predicted: Predictions,
    raw: Raw | None,
    withheld: NDArray[np.float32] | None,
    tuned: NDArray[np.float64] | None = None,
) -> dict[str, Any]:
    from fusion.metrics.subsets import score_set, score_subgroups

    spec, settings = task_spec(config.task), config.evaluate
    paired = predicted.has_cxr
    everything = np.ones(len(paired), bool)
    sets = {"partial": everything}
    if len(spec.modalities) > 1:
        sets["paired"] = paired
    chosen = {name: sets[name] for name in settings.sets if name in sets and sets[name].any()}
    scored: dict[str, Any] = {}
    subgroups: dict[str, Any] = {}
    for name, member in chosen.items():
        rows = (
            predicted.targets[member],
            predicted.probabilities[member],
            predicted.subjects[member],
        )
        scored[name] = score_set(*rows, config=settings, label_types=spec.label_types, tuned=tuned)
        members = {kind: _cut(groups, member) for kind, groups in _groups(predicted).items()}
        subgroups[name] = {
            kind: score_subgroups(*rows, groups, config=settings)
            for kind, groups in members.items()
        }
    if withheld is not None:
        scored["ehr_only"] = score_set(
            predicted.targets[paired],
            withheld[paired],
            predicted.subjects[paired],
            config=settings,
            label_types=spec.label_types,
            tuned=tuned,
        )
    return {
        "format": FORMAT,
        "lineage": predicted.lineage,
        "labels": list(predicted.labels),
        "label_types": list(spec.label_types),
        "evaluate": settings.model_dump(mode="json"),
        "sets": scored,
        "subgroups": subgroups,
        "missingness": _missingness(predicted, raw.rows, withheld, settings) if raw else [],
        "attention": _attention(raw, predicted) if raw else {},
    }


def _groups(predicted: Predictions) -> dict[str, dict[str, NDArray[np.bool_]]]:
    from fusion.metrics.subsets import age_band_members

    sex = predicted.sex
    return {
        "age": age_band_members(predicted.age),
        "sex": {name: sex == name for name in ("F", "M")},
    }


def _cut(
    groups: dict[str, NDArray[np.bool_]], member: NDArray[np.bool_]
) -> dict[str, NDArray[np.bool_]]:
    return {name: group[member] for name, group in groups.items()}


def _missingness(
    predicted: Predictions,
    rows: NDArray[np.int64],
    withheld: NDArray[np.float32] | None,
    settings: EvaluateConfig,
) -> list[dict[str, Any]]:
    """Scores of the paired rows while the image of a growing share of them is withheld."""
    from fusion.metrics.subsets import score_subgroups
    from ray_jobs.inference import withholding_order

    if withheld is None:
        return []
    paired = np.flatnonzero(predicted.has_cxr)
    order = np.argsort(withholding_order(rows[paired], settings.seed), kind="stable")
    points = []
    for share in settings.withhold_cxr:
        losing = paired[order[: round(share * len(paired))]]
        probabilities = predicted.probabilities.copy()
        probabilities[losing] = withheld[losing]
        everything = {"all": np.ones(len(paired), bool)}
        found = score_subgroups(
            predicted.targets[paired],
            probabilities[paired],
            predicted.subjects[paired],
            everything,
            config=settings,
        )
        points.append({"share": share, "withheld": len(losing), **found["all"]})
    return points


def _attention(raw: Raw, predicted: Predictions) -> dict[str, Any]:
    """Mean attention of each label over the paired rows, and over those that have the label.

    [N, C, M] maps only (DrFuse Eq 7: EHR-distinct, shared, CXR-distinct); None without rows.
    """
    paired = predicted.has_cxr
    found: dict[str, Any] = {}
    for name, values in raw.features.items():
        if values.ndim != 3 or values.shape[1] != len(predicted.labels) or not paired.any():
            continue
        weights, targets = values[paired].astype(np.float64), predicted.targets[paired] == 1
        positive = [
            weights[targets[:, c], c].mean(0).tolist() if targets[:, c].any() else None
            for c in range(len(predicted.labels))
        ]
        found[name] = {
            "rows": len(weights),
            "mean": weights.mean(0).tolist(),
            "positives": targets.sum(0).tolist(),
            "mean_of_positives": positive,
        }
    return found


def _write_features(path: Path, raw: Raw, has_cxr: NDArray[np.bool_], seed: int) -> None:
    """Representations ([N, D] each) of a sample of the paired rows, with the rows' indices."""
    from ray_jobs.inference import withholding_order

    named = {name: values for name, values in raw.features.items() if values.ndim == 2}
    paired = np.flatnonzero(has_cxr)
    if not named or not len(paired):
        return
    order = np.argsort(withholding_order(raw.rows[paired], seed), kind="stable")
    sample = np.sort(paired[order[:SAMPLED_ROWS]])
    arrays = {name: values[sample].astype(np.float32) for name, values in named.items()}
    with atomic_path(path) as temporary:
        temporary.touch(mode=PRIVATE)
        with temporary.open("wb") as handle:
            np.savez(handle, allow_pickle=False, row=raw.rows[sample], **arrays)
