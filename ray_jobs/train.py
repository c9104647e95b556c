"""`rayfuse train`: one run on Ray Train, from wherever its folder says it stands.

The way to the gradient: run -> train_loop_per_worker -> fusion/training/loop.py:train_step.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import InputError
from data.files import write_json
from data.manifest import Manifest
from data.shards import missing_classes, refuse_unlearnable
from ray_jobs import cluster, lineage, supervise
from ray_jobs import config as run_config
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from ray_jobs.config import RunConfig

logger = logging.getLogger(__name__)

HIDDEN = ".ray"
STOP = ".stop"


def run(config: RunConfig, *, fork: bool = False) -> Path:
    """Train a run to its end, or say that it has ended before.

    The same name and config continue an unfinished run with its very next step, on as many workers
    as are asked for now. Ctrl-C finishes the step, writes a checkpoint and raises; twice stops at
    once, and the last checkpoint holds.

    Args:
        config: The run.
        fork: Where the name belongs to another config, take the first free of <name>-2, <name>-3.

    Returns:
        The run's folder; best/ in it holds the weights to evaluate.

    Raises:
        InputError: The shards do not fit, the name belongs to another config, the cluster is too
            small, or the loss is not finite.
        KeyboardInterrupt: After Ctrl-C.
    """
    manifest = Manifest.load(config.data.shards)
    lineage.check_shards(config, manifest)
    refuse_unlearnable(manifest)
    if lacking := missing_classes(manifest):
        logger.warning("%s (%d such in all; see `rayfuse data describe`)", lacking[0], len(lacking))
    config = lineage.claim(config, manifest, fork=fork)
    folder = RunFolder(config.folder.absolute())
    if folder.outcome.is_file():
        logger.info("%s is finished already", config.name)
        return folder.path
    document = {
        "config": config.model_dump(mode="json"),
        "lineage": lineage.lineage(config, manifest),
        "environment": lineage.environment(),
    }
    with lineage.locked(folder), cluster.connect():
        (folder.path / STOP).unlink(missing_ok=True)
        supervise.check_resources(config.scaling)
        result = _fit(config, folder, document)
    (folder.path / STOP).unlink(missing_ok=True)
    if result["error"]:
        raise InputError(f"{config.name}: {result['error']}")
    if result["ending"] == "interrupted":
        raise KeyboardInterrupt(f"{config.name}: checkpoint written; the same command goes on")
    write_json(folder.outcome, {**result, "time": time.time()})
    shutil.rmtree(folder.path / HIDDEN, ignore_errors=True)
    return folder.path


def train_loop_per_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """One worker's part: its streams, its model under the strategy, and the loop.

    Args:
        payload: The config with absolute paths, the run's folder, what every checkpoint carries.

    Returns:
        Why the run ended, where it stands, and an error that is the same on every worker.
    """
    import ray.train
    import torch
    from ray.train.torch import get_device

    from fusion.training import loop
    from fusion.training.strategy import build_strategy
    from ray_jobs.session import open_session

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // ray.train.get_context().get_local_world_size()))
    torch.backends.cudnn.deterministic = True
    config = run_config.from_dump(payload["config"])
    strategy = build_strategy(config.scaling.strategy, get_device())
    session, fault = None, None
    try:
        session = open_session(config, RunFolder(Path(payload["folder"])), strategy, STOP)
    except InputError as error:
        fault = str(error)
    faults = [each for each in strategy.gather(fault) if each is not None]
    if session is None or faults:
        return {"ending": None, "error": faults[0]}
    session.document = payload["document"]
    result: dict[str, Any] = {"ending": None, "error": None}
    try:
        result["ending"] = loop.fit(session)
    except loop.AgreedError as error:
        result["error"] = str(error)
    return {**result, **session.progress.dump()}


def _fit(config: RunConfig, folder: RunFolder, document: dict[str, Any]) -> dict[str, Any]:
    from ray import train
    from ray.train.torch import TorchTrainer

    scaling = config.scaling
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={
            "config": supervise.absolute_paths(config.model_dump()),
            "folder": str(folder.path),
            "document": document,
        },
        scaling_config=train.ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker=dict(scaling.resources_per_worker) or None,
        ),
        # Ray resumes by name; our own checkpoints say where a run stands, so no name comes twice.
        run_config=train.RunConfig(
            name=f"start-{time.time_ns()}",
            storage_path=str(folder.path / HIDDEN),
            failure_config=train.FailureConfig(max_failures=scaling.max_failures),
        ),
    )
    fit = supervise.Supervised(trainer.fit, config, folder, folder.path / STOP)
    result: dict[str, Any] = fit.wait().return_value
    return result
