"""The README.md of an export: what the model is, was trained on, scores, and is not for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.manifest import Manifest
    from ray_jobs.inference import Trained
    from ray_jobs.runs import RunFolder

_SCORES = (("auroc", "AUROC"), ("auprc", "AUPRC"), ("brier", "Brier"))

_TEXT = """# {name}

{note}A `{model}` model of the task `{task}`: {count} probabilities from {modalities}.

| | |
|---|---|
| task | {task}: {labels} |
| reads | {modalities}{window} |
| trained on | {trained_on} |
| rows | {rows} |
| preset | {preset}{mixed} |
| parameters | {parameters:,} |
| weights | {selected} |

## Scores
{scores}

## Use
```
rayfuse predict THIS_FOLDER INPUT --out predictions.parquet
```
INPUT is a folder of tables (series, images) or of shards; units, levels and ranges of every
channel are in `preprocessing.json`. `manifest.json` holds the SHA-256 of each file; an altered one
is refused.

## Intended use and limits
For research on retrospective data. It is no medical device, was not validated prospectively, and
must not decide on a patient's care. {limits}Scores hold for rows like those it was trained on:
other hospitals, units of measurement, devices and years shift them, and subgroups may differ;
evaluate it there first.

## Licence
The software is under Apache-2.0. {licence}
"""


def text(trained: Trained, manifest: Manifest, run: RunFolder) -> str:
    """The card of a trained run."""
    from data.tasks import task_spec
    from ray_jobs.evaluate import is_synthetic

    config, spec = trained.config, task_spec(trained.config.task)
    synthetic = is_synthetic(manifest)
    shown = list(manifest.labels[:3])
    more = len(manifest.labels) - len(shown)
    held = [name for name in trained.model.modalities if name in spec.modalities]
    return _TEXT.format(
        name=config.name,
        note=f"{config.note}\n\n" if config.note else "",
        model=config.model.name,  # type: ignore[attr-defined]
        task=config.task,
        count=len(manifest.labels),
        labels="; ".join(shown) + (f"; and {more} more (config.json)" if more else ""),
        modalities=" and ".join(_MODALITIES[name] for name in held),
        window=f", first {spec.window_hours:g} h" if spec.window_hours else "",
        trained_on=f"{manifest.release}" + (", synthetic patients only" if synthetic else ""),
        rows=", ".join(f"{rows:,} {name}" for name, rows in manifest.splits.items()),
        preset=config.preset,
        mixed="" if manifest.preset == config.preset else f"; shards of preset {manifest.preset}",
        parameters=sum(value.numel() for value in trained.model.parameters()),
        selected=_selected(trained.meta),
        scores=_scores(trained, run),
        limits="It has seen no real patient. " if synthetic else "",
        licence=(
            "The weights were fitted to made-up patients."
            if synthetic
            else "The weights were fitted to data under its own use agreement (MIMIC: the "
            "PhysioNet Credentialed Health Data License), which may forbid passing them on: ask "
            "before you do."
        ),
    )


_MODALITIES = {
    "ehr": "ICU time series of 17 variables",
    "cxr": "chest X-rays",
    "notes": "notes",
    "labs": "laboratory values",
    "codes": "codes",
}


def _selected(meta: dict[str, Any]) -> str:
    progress = meta.get("progress") or {}
    if meta.get("selected") == "last" or progress.get("best_epoch") is None:
        return "of the last epoch" if meta.get("selected") == "last" else "the run's best"
    return f"of epoch {progress['best_epoch']}, the best on the validation split"


def _scores(trained: Trained, run: RunFolder) -> str:
    path = run.evaluation("test") / "metrics.json"
    if not path.is_file():
        return "Not evaluated before it was exported."
    metrics = json.loads(path.read_text(encoding="utf-8"))
    if metrics["lineage"].get("weights") != trained.meta["sha256"]:
        return "Not evaluated before it was exported (its evaluation is of earlier weights)."
    lines = ["Test split, macro means with 95 % intervals.", "", "| rows | metric | value |"]
    lines.append("|---|---|---|")
    for name, scored in metrics["sets"].items():
        for key, title in _SCORES:
            lines.append(f"| {name} | {title} | {_interval(scored['metrics'][key]['macro'])} |")
    return "\n".join(lines)


def _interval(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return "not defined"
    low, high = found.get("lower"), found.get("upper")
    bounds = f" ({low:.3f} to {high:.3f})" if low is not None and high is not None else ""
    return f"{found['value']:.3f}{bounds}"
