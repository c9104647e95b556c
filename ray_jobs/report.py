"""`rayfuse report`: one self-contained HTML file of one run, or of several compared."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from data.errors import InputError
from data.files import write_text
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from jinja2 import Template

    from data.manifest import Manifest
    from ray_jobs.config import RunConfig

TEMPLATE = "report.html.j2"
SPLITS = ("test", "val", "train")
SET_NAMES = {
    "partial": "all rows (PARTIAL)",
    "paired": "rows with an X-ray (PAIRED)",
    "ehr_only": "rows with an X-ray, X-ray withheld (EHR only)",
}


def write_report(run_folders: list[Path], out: Path) -> Path:
    """Write the report of evaluated runs.

    Everything is in the one file: no script, no font, no picture is fetched. Counts and scores
    that rest on fewer than ten patients, positives or negatives are not shown.

    Args:
        run_folders: runs/<name>, evaluated; with several, each has a section, and the first is
            compared with the others (paired differences where they scored the same rows).
        out: The HTML file.

    Returns:
        `out`.

    Raises:
        InputError: A folder is no run, or was not evaluated.
    """
    from ray_jobs.compare import compare_runs

    if not run_folders:
        raise InputError("report: no run given; name at least one run folder")
    runs = [_run_section(folder, number) for number, folder in enumerate(run_folders)]
    html = template(TEMPLATE).render(
        title=", ".join(run["name"] for run in runs),
        runs=runs,
        comparison=compare_runs(run_folders) if len(runs) > 1 else None,
    )
    write_text(out, html)
    return out


def template(name: str) -> Template:
    """A page of templates/."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Reached by path: the templates are package data, not a package.
    environment = Environment(
        loader=FileSystemLoader(__file__.rsplit("report.py", 1)[0] + "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def primary_split(run_folder: Path) -> str:
    """The evaluated split a report shows: test, else val, else train.

    Raises:
        InputError: None was evaluated.
    """
    for split in SPLITS:
        if (RunFolder(run_folder).evaluation(split) / "metrics.json").is_file():
            return split
    raise InputError(f"{run_folder}: not evaluated; run `rayfuse evaluate {run_folder}` first")


def read_metrics(run_folder: Path, split: str) -> dict[str, Any]:
    """metrics.json of an evaluation, its sets in the order of SET_NAMES.

    Raises:
        InputError: It is not valid JSON, or of another format.
    """
    from ray_jobs.evaluate import FORMAT

    path = RunFolder(run_folder).evaluation(split) / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); evaluate again") from None
    if not isinstance(metrics, dict) or metrics.get("format") != FORMAT:
        raise InputError(f"{path}: not of format {FORMAT}; evaluate again")
    for block in ("sets", "subgroups"):
        metrics[block] = {key: metrics[block][key] for key in SET_NAMES if key in metrics[block]}
    return metrics


def _run_section(folder: Path, number: int) -> dict[str, Any]:
    from ray_jobs import report_data, report_scores
    from ray_jobs.inference import load_config

    split = primary_split(folder)
    config, metrics = load_config(folder), read_metrics(folder, split)
    manifest, missing = _manifest(config, metrics)
    salt = f"run-{number}"
    history = report_data.history(folder)
    return {
        "anchor": salt,
        "name": config.name,
        "note": config.note,
        "split": split,
        "lineage": metrics["lineage"],
        "mixed": metrics["lineage"]["manifest_preset"] != metrics["lineage"]["preset"],
        "no_manifest": missing,
        "flow": report_data.flow(manifest) if manifest else [],
        "overview": report_data.overview(manifest) if manifest else None,
        "curves": report_data.curves(history, salt),
        "compute": report_data.compute(history, config),
        "environment": report_data.environment(folder),
        "sets": report_scores.sets(metrics, SET_NAMES),
        "evaluate": metrics["evaluate"],
        "decisions": report_scores.decisions(metrics, SET_NAMES),
        "tables": report_scores.label_tables(metrics, SET_NAMES),
        "calibration": report_scores.reliability_figure(metrics, salt),
        "subgroups": report_scores.subgroups(metrics, SET_NAMES),
        "sweep": report_scores.sweep(metrics, salt),
        "attention": report_scores.attention(metrics),
        "map": report_scores.representation_map(RunFolder(folder).evaluation(split), salt),
    }


def _manifest(config: RunConfig, metrics: dict[str, Any]) -> tuple[Manifest | None, str]:
    """The manifest the run was scored on, or None and why it is not shown."""
    from data.manifest import Manifest as Loaded

    try:
        manifest = Loaded.load(config.data.shards)
    except InputError:
        return None, "The shards are no longer where the run found them."
    if manifest.digest != metrics["lineage"]["manifest"]:
        return None, "The shards were extracted anew since this evaluation; evaluate again."
    return manifest, ""


def interval_text(value: Any, digits: int = 3) -> str:
    """A score with its interval, e.g. 0.812 (0.790 to 0.833)."""
    if value["value"] is None:
        return "not defined"
    point = f"{value['value']:.{digits}f}"
    if value["lower"] is None:
        return f"{point} (no interval)"
    return f"{point} ({value['lower']:.{digits}f} to {value['upper']:.{digits}f})"


def flatten(value: Any, prefix: str = "") -> Sequence[tuple[str, str]]:
    """Nested JSON as (dotted path, text) pairs."""
    if isinstance(value, dict):
        pairs: list[tuple[str, str]] = []
        for key in value:
            pairs += flatten(value[key], f"{prefix}.{key}" if prefix else str(key))
        return pairs
    if isinstance(value, list):
        return [(prefix, ", ".join(str(item) for item in value) or "none")]
    return [(prefix, "none" if value is None else str(value))]
