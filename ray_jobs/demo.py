"""`rayfuse demo`: raw tables to reports without data access, in one Ray instance."""

from __future__ import annotations

import os
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data.switches import Sources
from ray_jobs import cluster, evaluate, extract, report, train
from ray_jobs import config as run_config

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENTS = 1000
SEED = 2026
IMAGE_SIZE = 64
TASK = "phenotyping_48h"
REAL = {"mimic-iv": "mimic_iv", "mimic-iii": "mimic_iii"}


def run(
    out: Path, *, only: Literal["synthetic", "real"] | None, say: Callable[[str], None]
) -> list[Path]:
    """Both halves of the demo, or one; what is finished already is not done again.

    Returns:
        The reports.
    """
    start = time.monotonic()
    reports = []
    # Two workers with one core each, and room for the tasks beside them.
    with cluster.connect(num_cpus=max(4, os.cpu_count() or 1)):
        if only != "real":
            reports.append(_synthetic(out, say))
            say(f"first report after {time.monotonic() - start:.0f} s: {reports[-1]}")
        if only != "synthetic":
            reports += [_real(name, out, say) for name in REAL]
    say(f"\ndone in {time.monotonic() - start:.0f} s. Reports:")
    for path in reports:
        say(f"  {path}")
    return reports


def _synthetic(out: Path, say: Callable[[str], None]) -> Path:
    from data.files import atomic_path
    from data.sources import synthetic

    hospital = out / "hospital"
    if not hospital.is_dir():
        say(f"1. a synthetic hospital of {PATIENTS} patients: raw tables, X-rays, notes")
        with atomic_path(hospital) as unfinished:
            synthetic.generate(
                unfinished,
                patients=PATIENTS,
                seed=SEED,
                release="mimic-iv-2.2",
                image_size=IMAGE_SIZE,
            )
    sources = Sources(
        mimic_iv=hospital / "mimiciv" / "2.2", mimic_cxr=hospital / "mimic-cxr-jpg" / "2.0.0"
    )
    say("2. MedFuse and DrFuse on it: extraction, training on two workers, evaluation")
    return _run_file("synthetic", sources, out, "synthetic", say)


def _real(name: str, out: Path, say: Callable[[str], None]) -> Path:
    demo = resources.files("data").joinpath("demo", name)
    sources = Sources.model_validate({REAL[name]: Path(str(demo))})
    say(
        f"3. the open {name} demo, time series only. 100 patients: a check that the path runs on"
        " real tables, not a result"
    )
    return _run_file("real", sources, out, name, say)


def _run_file(
    file: str, sources: Sources, out: Path, label: str, say: Callable[[str], None]
) -> Path:
    shards = out / "shards" / label
    runs = run_config.load(
        run_config.CONFIGS / "demo" / f"{file}.yaml",
        [f"runs_dir={out / 'runs' / label}", f"data.shards={shards}"],
    )
    manifest = extract.run(sources, TASK, shards, preset="corrected", config=runs[0].data.extract)
    say(f"   {manifest.rows} stays of {manifest.release}")
    folders = []
    for one in runs:
        folder = train.run(one)
        evaluate.run(folder)
        folders.append(folder)
        say(f"   {one.name}: trained and evaluated")
    return report.write_report(folders, out / f"{label}.html")
