"""A report with enough rows that every section is drawn."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from data.flow import FlowStep, Quarantined
from data.manifest import Manifest
from ray_jobs import evaluate, report
from ray_jobs.inference import load_config
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable

_RUNS = Path(__file__).parents[1] / "ray_jobs" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("runs_conftest", _RUNS)
_MODULE = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = _MODULE
_SPEC.loader.exec_module(_MODULE)
make_run = _MODULE.make_run

RULES = (
    ("all ICU stays", 73181, 73181, "every row of icustays"),
    ("adults", 73181, 73173, "age at admission is 18 or more"),
    ("no transfer", 73173, 66012, "first and last care unit are the same"),
    ("first stay of an admission", 66012, 61012, "one ICU stay in the hospital stay"),
    ("48 hours", 61012, 600, "the stay lasts as long as the task's window"),
)


@pytest.fixture(scope="session")
def report_file(make_run: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two evaluated runs in one report, labels tied to a channel so that scores differ."""

    def planted(rows: list[dict]) -> None:
        rng = np.random.default_rng(1)
        for row in rows:
            risk = rng.normal()
            row["labels"] = (rng.normal(risk, 1, len(row["labels"])) > 0.4).astype(np.float32)

    shards = tmp_path_factory.mktemp("shots") / "shards"
    folders = [make_run("drfuse", name="drfuse", shards=shards, rows=600, edit=planted)]
    folders.append(make_run("medfuse", name="medfuse", shards=shards))
    manifest = Manifest.load(load_config(folders[0]).data.shards)
    manifest.model_copy(
        update={
            "release": "mimic-iv-2.2-synthetic",
            "flow": tuple(
                FlowStep(rule=rule, unit="stays", rows_in=a, rows_out=b, why=why)
                for rule, a, b, why in RULES
            ),
            "quarantine": (
                Quarantined(place="chartevents", reason="valuenum is not a number", count=412),
            ),
            "counters": {"temperature: Fahrenheit to Celsius": 51234, "weight: pounds to kg": 4},
        }
    ).write(shards)
    for folder in folders:
        environment = {
            "packages": {"torch": "2.15", "ray": "2.60"},
            "cpus": 2,
            "manifest": "f" * 64,
        }
        RunFolder(folder).environment.write_text(json.dumps(environment), encoding="utf-8")
        evaluate.run(folder)
    return report.write_report(folders, shards.parent / "report.html")
