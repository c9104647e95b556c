"""Every shipped YAML loads under every preset it allows, and its model builds."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from data.tasks import task_spec
from fusion import registry
from fusion.encoders.text_base import TINY_LLAMA
from ray_jobs import config as run_config

CONFIGS = sorted((Path(run_config.__file__).parent / "configs").rglob("*.yaml"))
TINY_BACKBONE = {"backbone": str(TINY_LLAMA), "random_weights": True, "max_length": 512}
RUNS = [path for path in CONFIGS if path.parent.name != "search"]


def test_there_are_runs_of_every_system() -> None:
    folders = {path.parent.name for path in RUNS}
    assert {"medfuse", "drfuse", "medfuse_llm", "demo"} <= folders


@cache
def _builds(model: object, task: str) -> bool:
    kind = registry.get(model.name)  # type: ignore[attr-defined]
    if "backbone" in type(model).model_fields:  # type: ignore[attr-defined]
        # Neither its language model nor vectors of one are part of the repository.
        kept = {"embeddings": None} if hasattr(model, "embeddings") else {}
        model = model.model_copy(update={**TINY_BACKBONE, **kept})  # type: ignore[attr-defined]
    built = kind(model, task_spec(task))
    return sum(parameter.numel() for parameter in built.parameters()) > 0


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_run_loads_and_builds(path: Path) -> None:
    runs = run_config.load(path)
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        assert _builds(run.model, run.task)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_stages_start_from_runs_that_exist(path: Path) -> None:
    """`init_from` of a stage names a stage before it, or a run of another shipped file."""
    shipped = {str(run.folder) for other in RUNS for run in run_config.load(other)}
    for run in run_config.load(path):
        for weights in run.init_from.values():
            assert str(weights) in shipped


def test_names_are_unique_across_files() -> None:
    names: dict[str, Path] = {}
    for path in RUNS:
        for run in run_config.load(path):
            assert names.setdefault(run.name, path) == path, run.name


@pytest.mark.parametrize("preset", ["corrected", "code", "paper"])
def test_every_preset_line_reaches_a_field(preset: str) -> None:
    """A dotted path that no run takes up would be silently dead."""
    lines = set(run_config.preset_values(preset))
    for dotted in lines:
        model = dotted.split("[")[1].split("]")[0].split("|")[0] if "[" in dotted else "lstm"
        values = run_config.preset_values(preset)
        reads_series = {"ehr", "cxr"} & set(registry.get(model).modalities)
        document = {
            "name": "x",
            "preset": preset,
            "task": "phenotyping" if reads_series else "diagnoses",
            "model": {"name": model},
            "data": {"shards": "s"},
        }
        run = run_config.from_document(document, place=preset)
        dump = run.model_dump(mode="json")
        for part in run_config.plain_path(dotted).split("."):
            dump = dump[part]
        assert dump == values[dotted]
