"""Does a search of real runs find a best value that is known in closed form?

Labels of a synthetic hospital's stays are drawn from logistic regressions on the outputs of a fixed
random LSTM, with weights from N(0, tau^2). A run trains the head on that frozen encoder under Adam
with `optim.weight_decay` d, which adds d/2 |w|^2 to the mean over N rows and C labels of the
cross-entropy. The penalty of the posterior mode is then d = 1 / (N C tau^2): sigma^2 / tau^2 of
ridge regression (Hoerl and Kennard 1970) with the unit noise of the logistic likelihood.

`rayfuse tune`'s own code searches d on Ray Tune and Ray Train; the JSON holds what was found, what
is known, and how far the runs are from the exact minimum of what they minimise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from data.batches import BatchConfig
from data.files import sha256_file, write_json
from data.loader import open_stream
from data.manifest import Manifest
from data.reader import ShardReader
from data.sources import synthetic
from data.switches import ExtractConfig, Sources
from data.tasks import task_spec
from fusion import registry
from fusion.layers.present import present_series
from ray_jobs import cluster, extract, tune
from ray_jobs.config import RunConfig
from ray_jobs.search.space import SearchConfig
from ray_jobs.search.study import Study

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rows = tuple[NDArray[np.float64], NDArray[np.float64]]

RESULTS = Path(__file__).parent / "results" / "planted_optimum.json"
TASK = "phenotyping_48h"
HIDDEN, TAU = 64, 0.3
SPREAD = {"weight_ih": 6.0, "weight_hh": 2.0}
"""Factors on the encoder's weights: a fresh LSTM's outputs are too alike to fit in a few epochs."""
PATH = "optim.weight_decay"


def main() -> None:
    """Generate, extract, plant, search, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="kept, and gone on with; default: temporary")
    parser.add_argument("--patients", type=int, default=3000)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=40)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rf-planted-") as temporary:
        work = given.work or Path(temporary)
        with cluster.connect():
            shards = _extracted(work, given.patients)
            known, rows = plant(shards, work / "encoder.safetensors")
            result = search(given, work, known, rows)
    print(json.dumps(result, indent=2))
    write_json(RESULTS, result)


def plant(shards: Path, encoder: Path) -> tuple[float, dict[str, Rows]]:
    """Draw the labels anew, once, and write the encoder's weights.

    Args:
        shards: Rewritten with their manifest, so that they are shards like any others.
        encoder: A weights file for `init_from`.

    Returns:
        The best weight decay, and ([N, H + 1] outputs and a one, [N, C] labels) of each split.
    """
    spec = task_spec(TASK)
    torch.manual_seed(0)
    kind = registry.get("lstm")
    model = kind(kind.Config.model_validate({"name": "lstm", "hidden": HIDDEN}), spec).eval()
    lstm = model.get_submodule("ehr_encoder")
    with torch.no_grad():
        for name, value in lstm.named_parameters():
            for part, factor in SPREAD.items():
                if part in name:
                    value.mul_(factor)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, encoder)
    reader = ShardReader(shards, None)
    generator = np.random.default_rng(0)
    weights = TAU * generator.normal(size=(HIDDEN + 1, len(spec.labels)))
    features = np.empty((reader.manifest.rows, HIDDEN + 1))
    labels: dict[int, NDArray[np.float64]] = {}
    found: dict[str, Rows] = {}
    for split in ("train", "val", "test"):
        stream = open_stream(
            shards, split, BatchConfig(), batch_size=256, seed=0, train=False, pixels=False
        )
        for batch in stream.epoch(0):
            assert batch is not None
            with torch.no_grad():
                values = lstm(*present_series(batch)).double().numpy()
            features[batch.rows] = np.hstack([values, np.ones((len(batch), 1))])
        stream.close()
        rows = reader.rows_of(split)
        chances = 1 / (1 + np.exp(-features[rows] @ weights))
        drawn = (generator.random(chances.shape) < chances).astype(np.float64)
        labels |= dict(zip(rows.tolist(), drawn, strict=True))
        found[split] = features[rows], drawn
    _rewrite(shards, np.stack([labels[row] for row in range(reader.manifest.rows)]))
    train_rows = len(found["train"][0])
    return 1 / (train_rows * len(spec.labels) * TAU**2), found


def exact(train: Rows, held_out: Rows, decay: float) -> float:
    """The mean cross-entropy on held-out rows at the exact minimum, by Newton's method."""
    x, y = train
    penalty, width = decay * y.size, x.shape[1]
    total = 0.0
    for label in range(y.shape[1]):
        w = np.zeros(width)
        for _ in range(50):
            p = 1 / (1 + np.exp(-x @ w))
            slope = x.T @ (p - y[:, label]) + penalty * w
            curve = (x.T * (p * (1 - p))) @ x + penalty * np.eye(width)
            step = np.linalg.solve(curve, slope)
            w -= step
            if np.abs(step).max() < 1e-10:
                break
        margin = held_out[0] @ w
        total += float((np.logaddexp(0, margin) - held_out[1][:, label] * margin).mean())
    return total / y.shape[1]


def search(
    given: argparse.Namespace, work: Path, known: float, rows: dict[str, Rows]
) -> dict[str, Any]:
    """Search the weight decay over eight decades around what is known, off its middle."""
    space = {PATH: {"log": [known * 1e-3, known * 1e5]}}
    config = SearchConfig.model_validate(
        {"space": space, "trials": given.trials, "metrics": {"loss": "min"}, "seed": 0}
    )
    plan = tune.Plan("planted-optimum", _run(work, given.epochs), config, confirm=False)
    tune.run(plan, say=lambda line: print(line, file=sys.stderr))
    study = Study(config, plan.run, plan.folder.path)
    train, val = rows["train"], rows["val"]
    trials = [
        {
            "weight_decay": t.params[PATH],
            "loss": t.value,
            "exact": exact(train, val, t.params[PATH]),
        }
        for t in study.best(given.trials)
    ]
    grid = known * np.logspace(-3, 5, 161)
    curve = [exact(train, val, decay) for decay in grid]
    best = trials[0]
    return {
        "rows": {split: len(x) for split, (x, _) in rows.items()},
        "labels": train[1].shape[1],
        "tau": TAU,
        "trials": len(trials),
        "epochs": given.epochs,
        "known_best": known,
        "found": best["weight_decay"],
        "decades_off": abs(math.log10(best["weight_decay"] / known)),
        "loss_found": best["loss"],
        "exact_loss_at_known": exact(train, val, known),
        "best_on_these_validation_rows": float(grid[int(np.argmin(curve))]),
        "exact_loss_at_ends": [curve[0], curve[-1]],
        "largest_gap_to_exact": max(abs(t["loss"] - t["exact"]) for t in trials),
        "losses": trials,
    }


def _run(work: Path, epochs: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "planted",
            "runs_dir": work / "runs",
            "task": TASK,
            "model": {"name": "lstm", "hidden": HIDDEN, "dropout": 0.0},
            "data": {"shards": work / "shards", "allow_mixed": True},
            "init_from": {"ehr_encoder": work / "encoder.safetensors"},
            "optim": {
                "lr": 0.1,
                "group_lr": {"ehr_encoder": 0},
                "schedule": "plateau",
                "plateau_patience": 1,
            },
            "train": {
                "epochs": epochs,
                "patience": epochs,
                "batch_size": 256,
                "restore": "last",
            },
            "scaling": {"resources_per_worker": {"CPU": 1}},
        }
    )


def _extracted(work: Path, patients: int) -> Path:
    hospital, shards = work / "hospital", work / "shards"
    if (shards / "manifest.json").is_file():
        return shards
    synthetic.generate(
        hospital,
        patients=patients,
        seed=11,
        release="mimic-iv-2.2",
        image_size=64,
        notes=False,
        chart_events_per_stay=200,
    )
    sources = Sources(mimic_iv=hospital / "mimiciv" / "2.2")
    extract.run(sources, TASK, shards, preset="corrected", config=ExtractConfig())
    return shards


def _rewrite(shards: Path, labels: NDArray[np.float64]) -> None:
    """Put labels [N, C] into the shards, in the order of their rows."""
    manifest, first, files = Manifest.load(shards), 0, []
    for file in manifest.files:
        path = shards / file.name
        table = pq.read_table(path)
        place = table.schema.get_field_index("labels")
        part = labels[first : first + file.rows].astype(np.float32)
        column = pa.array(list(part), table.schema.field("labels").type)
        pq.write_table(
            table.set_column(place, table.schema.field("labels"), column), path, row_group_size=256
        )
        files.append(file.model_copy(update={"sha256": sha256_file(path)}))
        first += file.rows
    manifest.model_copy(update={"files": tuple(files), "preset": "custom"}).write(shards)


if __name__ == "__main__":
    main()
