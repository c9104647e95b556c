"""What a report says of a run's data, training and environment."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ray_jobs.progress import texts_read
from ray_jobs.runs import RunFolder
from ray_jobs.suppression import SMALL, count_text, is_small, share_text

if TYPE_CHECKING:
    from pathlib import Path

    from data.flow import FlowStep
    from data.manifest import Manifest
    from ray_jobs.config import RunConfig

_BESIDE = ("lr", "steps", "of", "rows", "best")
"""Logged values that are no curve."""
_UNSAID = ("path", "folder", "dir", "host", "user", "time")


def flow(manifest: Manifest) -> list[dict[str, Any]]:
    """The attrition flow: a chain of rules for each unit.

    Each rule has the count that remains and the count excluded. From the first exclusion of fewer
    than ten on, what remains in that chain is rounded to tens, or a subtraction would show it.
    """
    chains: dict[str, list[FlowStep]] = {}
    for step in manifest.flow:
        chains.setdefault(step.unit, []).append(step)
    return [_chain(unit, steps) for unit, steps in chains.items()]


def _chain(unit: str, steps: list[FlowStep]) -> dict[str, Any]:
    rounded = False
    shown = []
    for step in steps:
        removed = step.rows_in - step.rows_out
        rounded = rounded or is_small(removed) or is_small(-removed)
        shown.append(
            {
                "rule": step.rule,
                "why": step.why,
                "added": removed < 0,
                "removed": count_text(abs(removed)) if removed else "",
                "remaining": _count(step.rows_out, rounded),
            }
        )
    return {"unit": unit, "start": _count(steps[0].rows_in, False), "steps": shown}


def _count(count: int, rounded: bool) -> str:
    if is_small(count):
        return f"< {SMALL}"
    return f"about {round(count, -1):,}" if rounded else f"{count:,}"


def overview(manifest: Manifest) -> dict[str, Any]:
    """Rows and modalities of each split, prevalences, and what was set aside."""
    modalities = list(dict.fromkeys(name for split in manifest.overlap.values() for name in split))
    splits = [name for name in manifest.splits if name in manifest.prevalence]
    return {
        "modalities": modalities,
        "splits": [
            {
                "name": name,
                "rows": count_text(rows),
                "overlap": [
                    count_text(manifest.overlap.get(name, {}).get(modality, 0))
                    for modality in modalities
                ],
            }
            for name, rows in manifest.splits.items()
        ],
        "prevalence_splits": splits,
        "prevalence": [
            {
                "label": label,
                "shares": [
                    share_text(manifest.prevalence[name][c], manifest.splits[name])
                    for name in splits
                ],
            }
            for c, label in enumerate(manifest.labels)
        ],
        "quarantine": [
            {"place": item.place, "reason": item.reason, "count": count_text(item.count)}
            for item in manifest.quarantine
        ],
        "counters": [
            (name, count_text(count)) for name, count in sorted(manifest.counters.items())
        ],
    }


def history(folder: Path) -> list[dict[str, Any]]:
    """The surviving lines of the run's metrics."""
    from fusion.training.metrics_log import read

    return read(RunFolder(folder).metrics)


def curves(lines: list[dict[str, Any]], salt: str) -> list[str]:
    """Figures over epochs: each loss term of training and the validation's loss; its scores."""
    from ray_jobs import figures

    train = _series(lines, "train")
    val = _series(lines, "val")
    losses = {f"train {name}": points for name, points in train.items()}
    if "loss" in val:
        losses["validation loss"] = val.pop("loss")
    drawn = []
    if losses:
        drawn.append(figures.curves(losses, title="Losses", salt=f"{salt}-losses"))
    for name, points in val.items():
        title = f"Validation {name}"
        drawn.append(figures.curves({name: points}, title=title, salt=f"{salt}-val-{name}"))
    return drawn


def _series(lines: list[dict[str, Any]], kind: str) -> dict[str, list[tuple[float, float]]]:
    """The last value of each epoch, by name."""
    series: dict[str, dict[float, float]] = {}
    for line in lines:
        if line["kind"] != kind:
            continue
        for name, value in line["values"].items():
            if name in _BESIDE or name.startswith("text_"):
                continue
            if isinstance(value, int | float):
                series.setdefault(name, {})[line["epoch"]] = float(value)
    return {name: sorted(points.items()) for name, points in series.items()}


def compute(lines: list[dict[str, Any]], config: RunConfig) -> list[tuple[str, str]]:
    """Wall time, throughput and workers; a pause between two attempts does not count."""
    seconds, previous = 0.0, None
    for line in lines:
        fresh = line["kind"] == "event" and line["values"].get("event") == "start"
        if previous is not None and not fresh:
            seconds += max(0.0, line["time"] - previous)
        previous = line["time"]
    steps = sum(line["values"].get("steps", 0) for line in lines if line["kind"] == "train")
    rows = steps * config.train.batch_size
    device = "GPU" if config.scaling.use_gpu else "CPU"
    scaling = config.scaling
    workers = (
        str(scaling.most) if scaling.least == scaling.most else f"{scaling.least} to {scaling.most}"
    )
    facts = [
        ("workers", f"{workers} ({device}, {scaling.strategy})"),
        ("rows of a global batch", str(config.train.batch_size)),
        ("precision", config.train.precision),
        ("training steps", f"{steps:,}"),
        ("wall time, validation included", _duration(seconds)),
    ]
    if seconds and rows:
        facts.append(("training rows a second, validation included", f"{rows / seconds:,.1f}"))
    if cut := texts_read(lines):
        facts.append(("texts", cut))
    return facts


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def environment(folder: Path) -> list[tuple[str, str]]:
    """env.json as pairs: hashes, and the last start's versions; nothing that names a place."""
    from ray_jobs.report import flatten

    path = RunFolder(folder).environment
    if not path.is_file():
        return []
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return [("env.json", "not readable")]
    starts = value.pop("starts", [])
    if starts:
        value |= {"starts": len(starts), "last start": starts[-1]}
    return [
        (name, text)
        for name, text in flatten(value)
        if not any(word in name.lower().split(".")[-1] for word in _UNSAID)
    ]
