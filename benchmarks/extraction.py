"""Extraction against a bare Polars scan of the same files, in the same run; JSON out.

    python benchmarks/extraction.py [--patients 850 3400] [--scratch DIR] [--out FILE]

For each size: a synthetic hospital in MIMIC-IV 2.2 layout (.csv.gz), then in processes of their own
(1) two bare single-process Polars programs, scan, filter, join and pivot of the chart and lab
events, one with typed columns as a reader would write it, one with all columns as text converted
after the filter; (2) the extraction, on a local Ray. CPU seconds are user + system of all processes
of a measured program. Ray's start and its workers' first import of this package are measured apart,
by extracting the 100 demo patients first. Peak RSS is the largest sum over all processes of the
program (pages they share are counted in each).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import mkdtemp

import psutil

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "data" / "demo" / "mimic-iv"


class Meter:
    """CPU seconds and peak RSS of this process and all below it."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, float], float] = {}
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _sample(self) -> int:
        rss = 0
        root = psutil.Process()
        for process in [root, *root.children(recursive=True)]:
            try:
                with process.oneshot():
                    spent = process.cpu_times()
                    self._seen[(process.pid, process.create_time())] = spent.user + spent.system
                    rss += process.memory_info().rss
            except psutil.Error:
                continue
        return rss

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            self._peak = max(self._peak, self._sample())

    def cpu(self) -> float:
        """CPU seconds so far, of processes that have ended too as far as they were seen."""
        self._sample()
        return sum(self._seen.values())

    def restart_peak(self) -> int:
        """The peak since the last call, in bytes."""
        peak, self._peak = self._peak, 0
        return peak


def bare(folder: Path, *, typed: bool) -> dict[str, float]:
    """Scan, filter, join, pivot; nothing is written, nothing cleaned, nothing resumable."""
    import polars as pl

    from data.events import ITEMS, item_ids

    meter = Meter()
    started, imported = time.perf_counter(), meter.cpu()
    channel = pl.DataFrame(
        {
            "itemid": list(ITEMS),
            "channel": [item.channel for item in ITEMS.values()],
        }
    ).lazy()
    stays = pl.read_csv(
        folder / "icu" / "icustays.csv.gz", columns=["hadm_id", "stay_id", "intime", "outtime"]
    ).with_columns(pl.col("intime", "outtime").str.to_datetime())
    pieces, rows = [], 0
    for table in ("icu/chartevents", "hosp/labevents"):
        path = folder / f"{table}.csv.gz"
        names = pl.scan_csv(path).collect_schema().names()
        schema: dict[str, pl.DataType] = dict.fromkeys(names, pl.String())
        schema["itemid"] = pl.Int64()
        kinds = {
            "hadm_id": pl.Int64(),
            "charttime": pl.Datetime("us"),
            "storetime": pl.Datetime("us"),
        }
        if typed:
            schema |= kinds
        scan = (
            pl.scan_csv(path, schema=schema)
            .select("hadm_id", "itemid", "charttime", "storetime", "value", "valuenum", "valueuom")
            .filter(pl.col("itemid").is_in(sorted(item_ids("mimic-iv-2.2"))))
        )
        found = scan.collect(engine="streaming")
        if not typed:
            found = found.with_columns(
                pl.col("hadm_id").cast(pl.Int64),
                pl.col("charttime", "storetime").str.to_datetime(
                    "%Y-%m-%d %H:%M:%S", time_unit="us", strict=False
                ),
            )
        pieces.append(found)
    events = pl.concat(pieces).lazy().join(channel, on="itemid").join(stays.lazy(), on="hadm_id")
    rows = sum(piece.height for piece in pieces)
    binned = (
        events.filter(pl.col("charttime").is_between("intime", "outtime"))
        .with_columns(((pl.col("charttime") - pl.col("intime")).dt.total_hours()).alias("hour"))
        .sort("charttime")
        .group_by("stay_id", "hour", "channel")
        .agg(pl.col("value").last())
        .collect()
    )
    wide = binned.pivot("channel", index=["stay_id", "hour"], values="value")
    return {
        "wall_s": time.perf_counter() - started,
        "cpu_s": meter.cpu() - imported,
        "peak_rss_mb": max(meter.restart_peak(), meter._sample()) / 1e6,
        "events_kept": rows,
        "rows_out": wide.height,
    }


def ours(folder: Path, out: Path) -> dict[str, float]:
    """The extraction as `rayfuse data extract` runs it."""
    meter = Meter()
    started = time.perf_counter()
    from data.pipeline import extract
    from data.switches import ExtractConfig, Sources
    from ray_jobs import cluster

    config = ExtractConfig()
    with cluster.connect():
        warm = ExtractConfig(partitions=2 * (os.cpu_count() or 1))
        extract(Sources(mimic_iv=DEMO), "mortality", warm, out / "demo", preset="corrected")
        start = {"wall_s": time.perf_counter() - started, "cpu_s": meter.cpu()}
        meter.restart_peak()
        began, spent = time.perf_counter(), meter.cpu()
        manifest = extract(
            Sources(mimic_iv=folder), "phenotyping", config, out / "out", preset="corrected"
        )
        figures = {
            "wall_s": time.perf_counter() - began,
            "cpu_s": meter.cpu() - spent,
            "peak_rss_mb": meter.restart_peak() / 1e6,
            "samples": manifest.rows,
            "partitions": manifest.config["partitions"],
            "chart_events": next(
                step.rows_in for step in manifest.flow if step.rule == "chartevents read"
            ),
            "ray_start_wall_s": start["wall_s"],
            "ray_start_cpu_s": start["cpu_s"],
        }
    return figures


def measured(role: str, folder: Path, out: Path) -> dict[str, float]:
    """Run one side in a process of its own; its last line is JSON."""
    command = [sys.executable, __file__, "--role", role, "--hospital", str(folder)]
    done = subprocess.run(
        [*command, "--scratch", str(out)],
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    return json.loads(done.stdout.decode().splitlines()[-1])


def hospital(scratch: Path, patients: int) -> Path:
    """A synthetic hospital of that size, kept from an earlier run if it is there."""
    folder = scratch / f"hospital-{patients}" / "mimiciv" / "2.2"
    if not (folder.parent.parent / "truth").is_dir():
        from data.sources.synthetic import generate

        generate(
            folder.parent.parent,
            patients=patients,
            seed=0,
            release="mimic-iv-2.2",
            cxr=False,
            notes=False,
            chart_events_per_stay=4300,
        )
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, nargs="+", default=[212, 850, 3400])
    parser.add_argument("--scratch", type=Path, help="folder for the hospitals; kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/extraction.json")
    parser.add_argument("--role", choices=("typed", "text", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--hospital", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role:
        if given.role == "ours":
            figures = ours(given.hospital, given.scratch)
        else:
            figures = bare(given.hospital, typed=given.role == "typed")
        print(json.dumps(figures))
        return
    scratch = given.scratch or Path(mkdtemp(prefix="rayfuse-bench-"))
    runs = []
    for patients in given.patients:
        folder = hospital(scratch, patients)
        out = Path(mkdtemp(prefix="run-", dir=scratch))
        typed = measured("typed", folder, out)
        text = measured("text", folder, out)
        extraction = measured("ours", folder, out)
        shutil.rmtree(out)
        runs.append(
            {
                "patients": patients,
                "gzip_mb": sum(path.stat().st_size for path in folder.rglob("*.gz")) / 1e6,
                "extraction": extraction,
                "bare_polars_typed": typed,
                "bare_polars_text": text,
                "chart_rows_per_cpu_s": extraction["chart_events"] / extraction["cpu_s"],
                "cpu_ratio_to_typed": extraction["cpu_s"] / typed["cpu_s"],
                "cpu_ratio_to_text": extraction["cpu_s"] / text["cpu_s"],
            }
        )
        print(json.dumps(runs[-1], indent=1))
    result = {
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "command": " ".join(
            ["python benchmarks/extraction.py --patients", *map(str, given.patients)]
        ),
        "runs": runs,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
