"""What checkpoints cost: training held up by a save, in place and beside it; kill to next step.

    python benchmarks/checkpoint.py [--saves 3] [--models medfuse drfuse] [--no-recovery]

MedFuse and DrFuse at their papers' sizes train on random batches, on one CPU worker. A cycle is a
few steps and one save; what the save costs is the cycle less as many steps without a save, so that
steps slowed by the writing thread count; the CPU seconds beside it depend less on what else the
machine does. Then a worker of a small run on Ray is killed by SIGKILL;
the workers' heartbeats say where the time until the next step goes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data.files import write_json
from data.schema import MODALITIES, N_FEATURES, Batch
from data.tasks import task_spec
from fusion import registry
from fusion.tasks import Task
from fusion.training import loop
from fusion.training.config import CheckpointConfig, TrainConfig
from fusion.training.optim import OptimConfig
from fusion.training.strategy import Single

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[1]
BATCH, HOURS, IMAGE = 16, 48, 224
CYCLE = 2
INTERVAL_S = 300.0
MODES = {"none": None, "sync": False, "async": True}
TASK = "phenotyping_48h"


class Random:
    """The same random batch again and again: what it holds does not change what a save costs."""

    steps_per_epoch = 10_000

    def __init__(self, labels: int) -> None:
        generator = torch.Generator().manual_seed(0)
        present = {name: torch.zeros(BATCH, dtype=torch.bool) for name in MODALITIES}
        present["ehr"][:] = present["cxr"][:] = True
        self.batch = Batch(
            ehr=torch.randn(BATCH, HOURS, N_FEATURES, generator=generator),
            lengths=torch.full((BATCH,), HOURS),
            cxr=torch.randn(BATCH, 3, IMAGE, IMAGE, generator=generator),
            cxr_index=torch.arange(BATCH),
            present=present,
            targets=torch.randint(0, 2, (BATCH, labels), generator=generator).float(),
            cxr_targets=torch.zeros(BATCH, 14),
            rows=np.arange(BATCH),
        )

    def epoch(self, epoch, start_step=0):
        """From a step on."""
        for _ in range(start_step, self.steps_per_epoch):
            yield self.batch


def train(model: str, folder: Path, asynchronous: bool | None, saves: int) -> dict:
    """Seconds of each cycle of steps, and what the saver says of its saves."""
    kind, spec = registry.get(model), task_spec(TASK)
    config = kind.Config.model_validate({"name": model, "image_weights": None})
    settings = loop.Settings(
        TrainConfig(batch_size=BATCH),
        OptimConfig(),
        CheckpointConfig(
            every_steps=None if asynchronous is None else CYCLE,
            asynchronous=bool(asynchronous),
        ),
    )
    strategy = Single()
    built = loop.prepare(strategy, lambda: kind(config, spec), settings)
    stream, began, written = Random(len(spec.labels)), [], []
    session = loop.Session(strategy, Task(spec), settings, stream, stream, folder)

    class Log:
        def write(self, kind, progress, values):
            if values.get("event") == "checkpoint":
                written.append(values)

        def rotate(self):
            pass

    def beat(stage, progress):
        if stage == "census":
            began.append((time.perf_counter(), time.process_time()))

    session.log, session.beat = Log(), beat
    # The first cycle warms up; the last save is of the stop.
    session.stop_requested = lambda: session.progress.updates >= CYCLE * (saves + 1)
    loop.fit(session)
    marks = list(itertools.pairwise(began[CYCLE::CYCLE]))
    return {
        "cycles_s": [later[0] - earlier[0] for earlier, later in marks],
        "cpu_s": [later[1] - earlier[1] for earlier, later in marks],
        "held_s": [each["held_s"] for each in written[1:-1]],
        "written_s": [each["written_s"] for each in written[1:-1]],
        "bytes": sum(
            path.stat().st_size
            for path in max((folder / "checkpoints").iterdir()).rglob("*.safetensors")
        ),
        "parameters": sum(value.numel() for value in built.parameters()),
    }


def cost(model: str, saves: int) -> dict:
    """Seconds a step, seconds a save costs, and its share of training at one in five minutes."""
    with tempfile.TemporaryDirectory() as root:
        # In turns, so that other load on the machine meets all alike.
        runs = {
            mode: train(model, Path(root) / mode, asynchronous, saves)
            for mode, asynchronous in MODES.items()
        }
    cycle = statistics.median(runs["none"]["cycles_s"])
    cpu = statistics.median(runs["none"]["cpu_s"])
    found = {
        "parameters": runs["none"]["parameters"],
        "checkpoint_mb": runs["sync"]["bytes"] / 1e6,
        "step_s": cycle / CYCLE,
        "step_cpu_s": cpu / CYCLE,
    }
    for mode in ("sync", "async"):
        run = runs[mode]
        lost = statistics.median(run["cycles_s"]) - cycle
        # On a busy machine the difference of two cycles may be less than what the saver measured.
        least = max(lost, statistics.median(run["held_s"]))
        found[mode] = {
            "lost_s": lost,
            "cpu_s": statistics.median(run["cpu_s"]) - cpu,
            "held_s": statistics.median(run["held_s"]),
            "written_s": statistics.median(run["written_s"]),
            "share_at_one_every_5_minutes": least / (INTERVAL_S + least),
        }
    return found


def recovery() -> dict:
    """Seconds from the SIGKILL of a worker to the next step, and the stages they pass."""
    from fusion.training import metrics_log
    from ray_jobs import chaos, chaos_run, cluster
    from ray_jobs import train as train_job
    from ray_jobs.faults import Disturbance, Strikers
    from ray_jobs.runs import RunFolder

    seen: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as root, cluster.connect(num_cpus=4):
        config = chaos_run.prepare(None, ["train.epochs=2"], Path(root))
        folder, strikers = RunFolder(config.folder), Strikers()
        after = (config.checkpoint.every_steps or 1) + 2

        def watch(status) -> None:
            beats = status.beats
            if "killed" not in seen:
                if beats and status.groups == 1 and max(b.updates for b in beats) >= after:
                    seen["killed"] = time.time()
                    strikers.kill(beats[-1].node, beats[-1].pid)
            elif status.groups == 2:
                for beat in beats:
                    seen.setdefault(beat.stage, time.time())

        train_job.run(config, observer=train_job.Observer(watch, Disturbance(chaos.PACE_S)))
        lines = list(metrics_log.follow_files(folder.metrics))
        strikers.close()
    start = next(
        n for n in reversed(range(len(lines))) if lines[n]["values"].get("event") == "start"
    )
    loaded = lines[start]["time"]
    step = next(line["time"] for line in lines[start:] if line["kind"] == "train")
    ready = min(at for stage, at in seen.items() if stage != "killed")
    replayed = next(
        line["values"]["replayed"]
        for line in lines[start:]
        if line["values"].get("event") == "recovered"
    )
    return {
        "kill_to_next_step_s": step - seen["killed"],
        "until_new_workers_run_s": ready - seen["killed"],
        "until_the_checkpoint_is_loaded_s": loaded - ready,
        "until_the_first_step_is_done_s": step - loaded,
        "steps_replayed": replayed,
        "heartbeats_every_s": 0.5,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--models", nargs="*", default=["medfuse", "drfuse"])
    parser.add_argument("--no-recovery", action="store_true")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks/results/checkpoint.json",
        help="parts not run stay in it",
    )
    given = parser.parse_args()
    results: dict = {
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "batch": {"rows": BATCH, "hours": HOURS, "image": IMAGE, "steps_a_cycle": CYCLE},
        "others_on_the_machine": {"load_average_before": os.getloadavg()[0]},
    }
    before = json.loads(given.out.read_text(encoding="utf-8")) if given.out.is_file() else {}
    parts: dict[str, Callable[[], dict]] = {}
    parts |= {model: partial(cost, model, given.saves) for model in given.models}
    if not given.no_recovery:
        parts["recovery"] = recovery
    for name, measure in parts.items():
        results[name] = measure()
        print(json.dumps({name: results[name]}, indent=2), flush=True)
        write_json(given.out, before | results)


if __name__ == "__main__":
    main()
