"""Runs side by side: scores, and paired differences where they scored the same rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray_jobs import predictions as prediction_file
from ray_jobs.report import SET_NAMES, interval_text, primary_split, read_metrics
from ray_jobs.runs import RunFolder
from ray_jobs.suppression import HIDDEN, hides_group, hides_label

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fusion.metrics.config import EvaluateConfig
    from ray_jobs.predictions import Predictions

METRICS = {"auroc": "AUROC", "auprc": "AUPRC", "brier": "Brier"}
RANKED = ("auroc", "auprc")


def compare_runs(run_folders: Sequence[Path]) -> dict[str, Any]:
    """A table of all runs, and every other run minus the first.

    Both models of a difference are scored on the same resampled patients (seed and number of
    resamples of the first run's config), so what the rows share cancels.

    Returns:
        `rows`: one for each run and set; `differences`: one for each later run and set, with
        `reason` where there is none; `ranks`: each run's average rank over the labels, by set,
        of the runs that scored the first one's rows.
    """
    splits = [primary_split(folder) for folder in run_folders]
    metrics = [
        read_metrics(folder, split) for folder, split in zip(run_folders, splits, strict=True)
    ]
    rows = []
    for key in SET_NAMES:
        for found in metrics:
            if key in found["sets"]:
                rows.append(_score_row(key, found))
    differences: list[dict[str, Any]] = []
    together = [metrics[0]]
    for number in range(1, len(run_folders)):
        pair = (metrics[number], metrics[0])
        folders = (run_folders[number], run_folders[0])
        added = _differences(pair, folders, (splits[number], splits[0]))
        if not any(each["reason"] for each in added):
            together.append(metrics[number])
        differences += added
    first = metrics[0]["lineage"]
    alike = all(
        found["lineage"][key] == first[key]
        for found in metrics
        for key in ("task", "preset", "synthetic", "manifest")
    )
    return {
        "rows": rows,
        "differences": differences,
        "ranks": _ranks(together),
        "first": first["run"],
        "alike": alike,
    }


def _ranks(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average rank over labels (DrFuse, Table 3): 1 is the best, equal scores share their ranks.

    Labels that a report would not show, or that lack a score in one run, are left out.
    """
    from scipy.stats import rankdata

    found = []
    for key in SET_NAMES:
        sets = [each["sets"][key] for each in metrics if key in each["sets"]]
        if len(metrics) < 2 or len(sets) < len(metrics):
            continue
        head = sets[0]
        labels = [
            c
            for c, positives in enumerate(head["positives"])
            if not hides_label(head["rows"], positives)
            and all(one["metrics"]["auroc"]["labels"][c]["value"] is not None for one in sets)
        ]
        if not labels:
            continue
        means = [
            rankdata(
                [[-one["metrics"][m]["labels"][c]["value"] for c in labels] for one in sets], axis=0
            ).mean(1)
            for m in RANKED
        ]
        found += [
            {
                "set": SET_NAMES[key],
                "run": each["lineage"]["run"],
                "labels": len(labels),
                "scores": [f"{mean[number]:.2f}" for mean in means],
            }
            for number, each in enumerate(metrics)
        ]
    return found


def _score_row(key: str, found: dict[str, Any]) -> dict[str, Any]:
    scored, lineage = found["sets"][key], found["lineage"]
    hidden = hides_group(scored)
    return {
        "set": SET_NAMES[key],
        "run": lineage["run"],
        "model": lineage["model"],
        "preset": lineage["preset"],
        "data": "synthetic" if lineage["synthetic"] else lineage["release"],
        "scores": [
            HIDDEN if hidden else interval_text(scored["metrics"][metric]["macro"])
            for metric in METRICS
        ],
    }


def _differences(
    pair: tuple[dict[str, Any], dict[str, Any]],
    folders: tuple[Path, Path],
    splits: tuple[str, str],
) -> list[dict[str, Any]]:
    from fusion.metrics.config import EvaluateConfig

    names = [found["lineage"]["run"] for found in pair]
    head = {"pair": f"{names[0]} minus {names[1]}", "reason": ""}
    one, other = (
        prediction_file.read(
            RunFolder(folder).evaluation(split) / prediction_file.FILE_NAME,
        )
        for folder, split in zip(folders, splits, strict=True)
    )
    orders = prediction_file.same_rows(one, other)
    if splits[0] != splits[1] or orders is None:
        return [{**head, "set": "", "reason": "the two runs did not score the same rows"}]
    config = EvaluateConfig.model_validate(pair[1]["evaluate"])
    results = []
    for key in ("partial", "paired"):
        if all(key in found["sets"] for found in pair):
            paired_only = key == "paired"
            text = _difference(one, other, orders, config, paired_only=paired_only)
            if hides_group(pair[0]["sets"][key]):
                text = [HIDDEN] * len(METRICS)
            results.append({**head, "set": SET_NAMES[key], "scores": text})
    return results


def _difference(
    one: Predictions,
    other: Predictions,
    orders: tuple[Any, Any],
    config: EvaluateConfig,
    *,
    paired_only: bool,
) -> list[str]:
    from fusion.metrics.subsets import paired_difference

    first, second = orders
    if paired_only:
        kept = one.has_cxr[first]
        first, second = first[kept], second[kept]
    found = paired_difference(
        one.targets[first],
        one.probabilities[first],
        other.probabilities[second],
        one.subjects[first],
        config=config,
    )
    return [interval_text(found[metric]["macro"]) for metric in METRICS]
