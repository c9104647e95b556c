"""What a search finds, and what it costs.

Prints JSON. Parts:
- ridge: the penalty of a ridge regression with known noise and signal; the best one is their
  ratio, sigma^2 / tau^2 (Hoerl and Kennard 1970). How far off a search of 40 trials is.
- samplers: TPE against random on Hartmann's six-dimensional function (Dixon and Szego 1978),
  seed by seed: regret after so many trials, and the 95 % interval of the mean difference.
- ray: seconds of a trial through Tune and Train against calling `train.run`, and trials an hour
  with one and two at once, on synthetic shards.
- caches: trials an hour of a fusion model with a frozen image encoder, whose outputs every trial
  computes, or the first one for all (`train.cache_embeddings`), on synthetic shards with images.
- sleepers: trials that only sleep, on pretended workers: scheduling overhead, the driver's memory.

The first two go through the search's own code without Ray: study, sampler, journal, drive.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from data.files import write_json
from ray_jobs import config as run_config
from ray_jobs.config import RunConfig
from ray_jobs.search.budget import Budget
from ray_jobs.search.drive import Drive
from ray_jobs.search.folder import SearchFolder
from ray_jobs.search.runner import Ending, Job
from ray_jobs.search.serial import Serial
from ray_jobs.search.space import SearchConfig
from ray_jobs.search.study import Study
from ray_jobs.search.trials import Trials

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results" / "tune.json"
CONFIGS = Path(run_config.__file__).parent / "configs"
SIGMA, TAU = 3.0, 0.5
"""Standard deviations of the noise and of the weights: the best penalty is 36."""
ROWS, WIDTH, HELD_OUT, HOSPITALS = 120, 40, 4000, 30

# Dixon and Szego's constants; the least value, -3.32237, lies at HARTMANN_AT.
ALPHA = np.array([1.0, 1.2, 3.0, 3.2])
A = np.array(
    [
        [10, 3, 17, 3.5, 1.7, 8],
        [0.05, 10, 17, 0.1, 8, 14],
        [3, 3.5, 1.7, 10, 17, 8],
        [17, 8, 0.05, 10, 0.1, 14],
    ]
)
P = 1e-4 * np.array(
    [
        [1312, 1696, 5569, 124, 8283, 5886],
        [2329, 4135, 8307, 3736, 1004, 9991],
        [2348, 1451, 3522, 2883, 3047, 6650],
        [4047, 8828, 8732, 5743, 1091, 381],
    ]
)
HARTMANN_AT = (0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573)
LEAST = -3.32237
# Six paths of a run that take any number of [0, 1); only their places matter here.
SIX = (
    "model.lambda1",
    "model.lambda2",
    "model.lambda3",
    "model.dropout",
    "optim.plateau_factor",
    "model.rank_margin",
)


def base_run() -> RunConfig:
    """A shipped run, whose schema has the searched paths."""
    return run_config.load(CONFIGS / "drfuse" / "drfuse-full.yaml")[-1]


def search(
    config: dict[str, Any], score: Callable[[dict[str, float]], float], folder: Path
) -> Study:
    """A search of a cheap function by the code that searches runs."""
    run, found = base_run(), SearchConfig.model_validate({"metrics": {"loss": "min"}, **config})
    place = SearchFolder(folder)
    study = Study(found, run, folder)
    place.open(found, run)

    def body(job: Job, tell: Callable[[str, Any], None]) -> Ending:
        values = {path: float(value) for path, value in job.values.items() if value is not None}
        return Ending("finished", values={"loss": score(values)}, epoch=1)

    def silent(line: str) -> None:
        """Nothing."""

    Drive(run, place, Trials(study, silent), Budget(), Serial(body), silent).go()
    return study


class Ridge:
    """The mean squared error on held-out rows of many drawn regressions, by the penalty."""

    def __init__(self, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self._draws = []
        for _ in range(HOSPITALS):
            x = generator.normal(size=(ROWS, WIDTH))
            truth = TAU * generator.normal(size=WIDTH)
            y = x @ truth + SIGMA * generator.normal(size=ROWS)
            x_new = generator.normal(size=(HELD_OUT // HOSPITALS, WIDTH))
            y_new = x_new @ truth + SIGMA * generator.normal(size=len(x_new))
            self._draws.append((x.T @ x, x.T @ y, x_new, y_new))

    def error(self, penalty: float) -> float:
        """Held out, over all of them."""
        total = 0.0
        for gram, moment, x, y in self._draws:
            weights = np.linalg.solve(gram + penalty * np.eye(WIDTH), moment)
            total += float(((y - x @ weights) ** 2).mean())
        return total / len(self._draws)


def ridge(trials: int, folder: Path, seed: int = 0) -> dict[str, float]:
    """Search the penalty over six decades."""
    task = Ridge(seed)
    config = {"space": {"model.lambda1": {"log": [1e-2, 1e4]}}, "trials": trials, "seed": seed}
    study = search(config, lambda values: task.error(values["model.lambda1"]), folder)
    best = study.best(1)[0]
    known = SIGMA**2 / TAU**2
    return {
        "known_best": known,
        "found": best.params["model.lambda1"],
        "decades_off": abs(math.log10(best.params["model.lambda1"] / known)),
        "regret_share": best.value / task.error(known) - 1,
    }


def hartmann(values: dict[str, float]) -> float:
    """Hartmann's function of six numbers in [0, 1]."""
    x = np.array([values[path] for path in SIX])
    return float(-(ALPHA * np.exp(-(A * (x - P) ** 2).sum(1))).sum())


def samplers(seeds: int, trials: int, folder: Path) -> dict[str, Any]:
    """Regret of both samplers after the same number of trials, seed by seed."""
    space = {path: {"uniform": [0.0, 0.999]} for path in SIX}
    regrets: dict[str, list[float]] = {"tpe": [], "random": []}
    for seed in range(seeds):
        for name, found in regrets.items():
            config = {"space": space, "trials": trials, "sampler": name, "seed": seed}
            best = search(config, hartmann, folder / f"{name}-{seed}").best(1)[0]
            found.append(best.value - LEAST)
    difference = np.array(regrets["random"]) - np.array(regrets["tpe"])
    generator = np.random.default_rng(0)
    means = generator.choice(difference, (10_000, seeds)).mean(1)
    return {
        "seeds": seeds,
        "trials": trials,
        "median_regret": {name: float(np.median(found)) for name, found in regrets.items()},
        "mean_regret": {name: float(np.mean(found)) for name, found in regrets.items()},
        "random_minus_tpe": float(difference.mean()),
        "interval": [float(each) for each in np.percentile(means, (2.5, 97.5))],
        "tpe_better_in": int((difference > 0).sum()),
    }


def on_ray(shards: Path, folder: Path, trials: int) -> dict[str, Any]:
    """The same tiny run called directly, and as trials of a search, one and two at once."""
    from data.manifest import Manifest
    from ray_jobs import cluster, train, tune

    task = Manifest.load(shards).task

    def tiny(name: str) -> RunConfig:
        return RunConfig.model_validate(
            {
                "name": name,
                "runs_dir": folder,
                "task": task,
                "model": {"name": "lstm", "hidden": 8},
                "data": {"shards": shards},
                "train": {"epochs": 3, "batch_size": 16, "patience": 100},
                "scaling": {"resources_per_worker": {"CPU": 1}},
            }
        )

    found: dict[str, Any] = {"trials": trials}
    space = {"optim.lr": {"log": [1e-3, 1e-1]}}
    for at_once in (1, 2):
        with cluster.connect(num_cpus=at_once):
            train.run(tiny(f"warm-{at_once}"))  # imports and caches are not a trial's cost
            started = time.monotonic()
            train.run(tiny(f"direct-{at_once}"))
            direct = time.monotonic() - started
            config = SearchConfig.model_validate(
                {"space": space, "trials": trials, "metrics": {"auroc": "max"}}
            )
            plan = tune.Plan(f"search-{at_once}", tiny("searched"), config, confirm=False)
            started = time.monotonic()
            tune.run(plan)
            spent = time.monotonic() - started
        found[f"{at_once}_at_once"] = {
            "direct_s": round(direct, 1),
            "search_s_per_trial": round(spent / trials, 1),
            "trials_per_hour": round(3600 * trials / spent, 1),
        }
    return found


def caches(shards: Path, folder: Path, trials: int) -> dict[str, Any]:
    """The same search with and without keeping a frozen encoder's outputs, one trial at a time."""
    from data.manifest import Manifest
    from ray_jobs import cluster, tune

    task = Manifest.load(shards).task
    images = {"resize": 64, "size": 64, "augment": False}
    found: dict[str, Any] = {"trials": trials}
    for shared in (False, True):
        run = RunConfig.model_validate(
            {
                "name": "searched",
                "runs_dir": folder,
                "task": task,
                "model": {"name": "medfuse", "hidden": 32, "fusion_hidden": 32, "depth": 34},
                "data": {
                    "shards": shards,
                    "batches": {"image": images, "cache_dir": folder / f"cache-{shared}"},
                },
                "optim": {"group_lr": {"cxr_encoder": 0}},
                "train": {
                    "epochs": 5,
                    "batch_size": 32,
                    "patience": 100,
                    "cache_embeddings": shared,
                },
            }
        )
        config = SearchConfig.model_validate(
            {
                "space": {"optim.lr": {"log": [1e-4, 1e-2]}},
                "trials": trials,
                "metrics": {"auroc": "max"},
            }
        )
        with cluster.connect(num_cpus=1):
            started = time.monotonic()
            tune.run(tune.Plan(f"shared-{shared}", run, config, confirm=False))
            spent = time.monotonic() - started
        name = "kept_for_all" if shared else "computed_by_each"
        found[name] = {
            "seconds_per_trial": round(spent / trials, 1),
            "trials_per_hour": round(3600 * trials / spent, 1),
        }
    return found


def sleeping(payload: dict[str, Any], config: dict[str, Any]) -> None:
    """A trial that only sleeps."""
    from dataclasses import asdict

    from ray import tune

    tune.report({"told": json.dumps(["begun", None])})
    time.sleep(payload["seconds"])
    ending = Ending("finished", values={"loss": 0.0}, epoch=1)
    tune.report({"told": json.dumps(["ending", asdict(ending)])})


def sleepers(trials: int, workers: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Seconds beyond the sleep itself, and the driver's peak memory."""
    import resource
    from functools import partial

    from ray_jobs import cluster
    from ray_jobs.search.on_tune import OnTune

    run, place = base_run(), SearchFolder(folder)
    config = SearchConfig.model_validate(
        {
            "space": {"optim.lr": {"log": [1e-5, 1e-1]}},
            "metrics": {"loss": "min"},
            "sampler": "random",
            "trials": trials,
        }
    )
    run = run.model_copy(update={"scaling": run.scaling.model_copy(update={"use_gpu": False})})
    study = Study(config, run, folder)
    place.open(config, run)

    def silent(line: str) -> None:
        """Nothing."""

    with cluster.connect(num_cpus=workers):
        executor = OnTune(run.scaling, partial(_sleeping, seconds))
        started = time.monotonic()
        Drive(run, place, Trials(study, silent), Budget(), executor, silent).go()
        spent = time.monotonic() - started
    ideal = math.ceil(trials / workers) * seconds
    return {
        "trials": trials,
        "workers": workers,
        "sleep_s": seconds,
        "seconds": round(spent, 1),
        "overhead_s_per_trial": round((spent - ideal) / trials, 3),
        "driver_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "unfinished": study.unfinished,
    }


def _sleeping(seconds: float, payload: dict[str, Any], config: dict[str, Any]) -> None:
    sleeping({**payload, "seconds": seconds}, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="ridge,samplers", help="comma-separated")
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--shards", type=Path, help="for the parts `ray` and `caches`")
    parser.add_argument("--ray-trials", type=int, default=6)
    parser.add_argument("--sleepers", type=int, default=500)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS, help="parts not run stay in it")
    options = parser.parse_args()
    parts, found = options.parts.split(","), {}
    with tempfile.TemporaryDirectory(prefix="rf-tune-") as name:
        folder = Path(name)
        if "ridge" in parts:
            found["ridge"] = ridge(options.trials, folder / "ridge")
        if "samplers" in parts:
            found["samplers"] = samplers(options.seeds, options.trials, folder / "samplers")
        if "ray" in parts:
            if options.shards is None:
                parser.error("the part `ray` needs --shards")
            found["ray"] = on_ray(options.shards, folder / "ray", options.ray_trials)
        if "caches" in parts:
            if options.shards is None:
                parser.error("the part `caches` needs --shards with images")
            found["caches"] = caches(options.shards, folder / "caches", options.ray_trials)
        if "sleepers" in parts:
            place = folder / "sleepers"
            found["sleepers"] = sleepers(options.sleepers, options.workers, 5.0, place)
    print(json.dumps(found, indent=2))
    if options.out.is_file():
        found = json.loads(options.out.read_text(encoding="utf-8")) | found
    write_json(options.out, found)


if __name__ == "__main__":
    main()
