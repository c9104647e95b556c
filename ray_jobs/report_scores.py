"""What a report says of a run's scores; cells that rest on fewer than ten are left empty."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.metrics.decisions import MEANS
from ray_jobs.report import interval_text
from ray_jobs.suppression import HIDDEN, SMALL, count_text, hides_group, hides_label

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

METRICS = {"auroc": "AUROC", "auprc": "AUPRC", "brier": "Brier"}
THRESHOLDS = {"half": "0.5", "tuned": "tuned on val"}
PARTS = {3: ("time series only", "shared", "X-ray only")}
"""Columns of an attention map over three representations (DrFuse section 3.3)."""
_MAPPED = ("_shared", "_distinct")


def sets(metrics: Mapping[str, Any], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Each set's macro and micro scores, and the means of each type of label."""
    rows = []
    for key, scored in metrics["sets"].items():
        rows.append(_set_row(names.get(key, key), scored, None, metrics))
        for kind in dict.fromkeys(metrics["label_types"]):
            rows.append(_set_row(f"{kind} labels", scored, kind, metrics))
    return rows


def _set_row(
    name: str, scored: Mapping[str, Any], kind: str | None, metrics: Mapping[str, Any]
) -> dict[str, Any]:
    members = None
    if kind is not None:
        members = [c for c, one in enumerate(metrics["label_types"]) if one == kind]
    hidden = hides_group(scored, members)

    def text(metric: str, mean: str) -> str:
        if hidden:
            return HIDDEN
        found = scored["metrics"][metric]
        return interval_text(found[mean] if kind is None else found["types"][kind])

    return {
        "name": name,
        "part": kind is not None,
        "rows": "" if kind else count_text(scored["rows"]),
        "patients": "" if kind else count_text(scored["patients"]),
        "macro": [text(metric, "macro") for metric in METRICS],
        "micro": "" if kind else text("auroc", "micro"),
    }


def decisions(metrics: Mapping[str, Any], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Each set's scores of decisions, at 0.5 and at tuned thresholds."""
    return [
        {
            "name": names.get(key, key),
            "at": THRESHOLDS[kind],
            "scores": [
                HIDDEN if hides_group(scored) else interval_text(found["means"][score])
                for score in MEANS
            ],
        }
        for key, scored in metrics["sets"].items()
        for kind, found in scored["decisions"].items()
    ]


def label_tables(metrics: Mapping[str, Any], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """For each set, each label's scores, intervals and calibration."""
    return [
        {
            "name": names.get(key, key),
            "rows": [
                _label_row(metrics["labels"][c], _type(metrics, c), scored, c)
                for c in range(len(metrics["labels"]))
            ],
        }
        for key, scored in metrics["sets"].items()
    ]


def _type(metrics: Mapping[str, Any], index: int) -> str:
    types = metrics["label_types"]
    return types[index] if types else ""


def _label_row(label: str, kind: str, scored: Mapping[str, Any], index: int) -> dict[str, Any]:
    rows, positives = scored["rows"], scored["positives"][index]
    row: dict[str, Any] = {"label": label, "kind": kind}
    if hides_label(rows, positives):
        return {**row, "positives": HIDDEN, "scores": None}
    fitted = scored["calibration"]["labels"][index]
    found = {metric: scored["metrics"][metric]["labels"][index] for metric in METRICS}
    return {
        **row,
        "positives": f"{positives:,} ({100 * positives / rows:.1f} %)",
        "scores": [interval_text(found[metric]) for metric in METRICS],
        "bar": _bar(found["auroc"]),
        "ece": f"{fitted['ece']:.3f}",
        "slope": "none" if fitted["slope"] is None else f"{fitted['slope']:.2f}",
        "intercept": "none" if fitted["intercept"] is None else f"{fitted['intercept']:.2f}",
    }


def _bar(auroc: Mapping[str, Any]) -> dict[str, float] | None:
    """AUROC on a line of 100 units from 0.3 to 1."""
    if auroc["lower"] is None:
        return None
    return {
        name: round(100 * min(1.0, max(0.0, (auroc[name] - 0.3) / 0.7)), 1)
        for name in ("value", "lower", "upper")
    }


def reliability_figure(metrics: Mapping[str, Any], salt: str) -> str | None:
    """The calibration curve over all labels' decisions; bins of fewer than ten are left out."""
    from ray_jobs import figures

    points = {
        key: [
            (point["predicted"], point["observed"])
            for point in metrics["sets"][key]["calibration"]["micro"]["curve"]
            if point["rows"] >= SMALL
        ]
        for key in ("partial", "paired")
        if key in metrics["sets"] and not hides_group(metrics["sets"][key])
    }
    if not any(points.values()):
        return None
    return figures.reliability(points, title="Calibration, all labels", salt=f"{salt}-calibration")


def subgroups(metrics: Mapping[str, Any], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Age bands and sexes of each set: rows, macro scores."""
    found = []
    for key, kinds in metrics["subgroups"].items():
        for kind, groups in kinds.items():
            for name, group in groups.items():
                hidden = group["metrics"] is None or hides_group(group)
                scores = [
                    HIDDEN if hidden else interval_text(group["metrics"][metric]["macro"])
                    for metric in METRICS
                ]
                found.append(
                    {
                        "set": names.get(key, key),
                        "group": f"{kind} {name}",
                        "rows": count_text(group["rows"]),
                        "scores": scores,
                    }
                )
    return found


def sweep(metrics: Mapping[str, Any], salt: str) -> dict[str, Any] | None:
    """Figures and table of the scores while X-rays are withheld."""
    from ray_jobs import figures

    points = metrics["missingness"]
    if not points or hides_group(points[0]):
        return None
    drawn = []
    for metric in ("auroc", "auprc"):
        series = [{"share": p["share"], **p["metrics"][metric]["macro"]} for p in points]
        if all(one["value"] is not None for one in series):
            title = f"Macro {METRICS[metric]}, rows with an X-ray"
            drawn.append(
                figures.sweep({"model": series}, title=title, salt=f"{salt}-sweep-{metric}")
            )
    rows = [
        {
            "share": f"{100 * point['share']:.0f} %",
            "scores": [interval_text(point["metrics"][metric]["macro"]) for metric in METRICS],
        }
        for point in points
    ]
    return {"figures": drawn, "rows": rows, "n": count_text(points[0]["rows"])}


def attention(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Heat tables: mean attention of each label, over paired rows and over their positives."""
    tables = []
    for name, found in metrics["attention"].items():
        if found["rows"] < SMALL:
            continue
        width = len(found["mean"][0])
        rows = []
        for c, label in enumerate(metrics["labels"]):
            hidden = hides_label(found["rows"], found["positives"][c])
            positive = None if hidden else found["mean_of_positives"][c]
            rows.append({"label": label, "all": found["mean"][c], "positive": positive})
        default = tuple(f"part {part + 1}" for part in range(width))
        tables.append({"name": name, "parts": PARTS.get(width, default), "rows": rows})
    return tables


def representation_map(evaluation: Path, salt: str) -> str | None:
    """The t-SNE of the shared and the distinct representations of a sample of rows."""
    from ray_jobs import figures
    from ray_jobs.evaluate import FEATURES_FILE

    path = evaluation / FEATURES_FILE
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as kept:
        named = {
            name.replace("_", " "): kept[name]
            for name in sorted(kept.files)
            if name.endswith(_MAPPED)
        }
    if len(named) < 2 or min(len(values) for values in named.values()) < SMALL:
        return None
    title = "Shared and distinct representations (t-SNE)"
    return figures.scatter(figures.embed(named), title=title, salt=f"{salt}-map")
