"""`rayfuse train`: one run on Ray Train, from wherever its folder says it stands.

The way to the gradient: run -> train_loop_per_worker -> fusion/training/loop.py:train_step.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import InputError
from data.files import write_json
from data.manifest import Manifest
from data.shards import missing_classes, refuse_unlearnable
from ray_jobs import capacity, cluster, lineage, mirror, recovery, storage, supervise
from ray_jobs import config as run_config
from ray_jobs.runs import RunFolder
from ray_jobs.texts import refuse_missing

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusion.training import loop
    from ray_jobs.config import RunConfig
    from ray_jobs.heartbeat import Heart, Pulse, Status

logger = logging.getLogger(__name__)

HIDDEN = ".ray"
STOP = ".stop"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True)
class Observer:
    """Who looks on, or disturbs: `rayfuse chaos`.

    Attributes:
        watch: Told on the driver of each new status of the workers.
        session: Given each worker's session before it trains; travels to the workers.
    """

    watch: Callable[[Status], None] = lambda status: None
    session: Callable[[loop.Session], None] = lambda session: None


def run(config: RunConfig, *, fork: bool = False, observer: Observer | None = None) -> Path:
    """Train a run to its end, or say that it has ended before.

    The same name and config continue an unfinished run with its very next step, on as many workers
    as are asked for now. Ctrl-C or SIGTERM finishes the step, writes a checkpoint and raises; twice
    stops at once, and the last checkpoint holds. Lost workers, lost nodes and nodes about to be
    taken away are gone on from without being asked.

    Args:
        config: The run.
        fork: Where the name belongs to another config, take the first free of <name>-2, <name>-3.
        observer: Looks on, or disturbs.

    Returns:
        The run's folder; best/ in it holds the weights to evaluate.

    Raises:
        InputError: The shards do not fit, kept vectors are missing, the name belongs to another
            config, the cluster is too small, the loss is not finite, the disk is full, the storage
            fails, or the workers hang.
        KeyboardInterrupt: After Ctrl-C; after SIGTERM, `supervise.Terminated`.
    """
    manifest = Manifest.load(config.data.shards)
    lineage.check_shards(config, manifest)
    refuse_missing(config, ("train", "val"))
    refuse_unlearnable(manifest)
    if lacking := missing_classes(manifest):
        logger.warning("%s (%d such in all; see `rayfuse data describe`)", lacking[0], len(lacking))
    storage.check(config)
    config = lineage.claim(config, manifest, fork=fork)
    folder = RunFolder(config.folder.absolute())
    document = {
        "config": config.model_dump(mode="json"),
        "lineage": lineage.lineage(config, manifest),
        "environment": lineage.environment(),
    }
    with lineage.locked(folder), mirror.kept(config, folder) as copy:
        if folder.outcome.is_file():
            logger.info("%s is finished already", config.name)
            return folder.path
        with cluster.connect():
            capacity.check(config.scaling)
            lost = recovery.before(folder)
            with recovery.noted(folder):
                result = _fit(config, folder, document, lost, observer or Observer())
        write_json(folder.outcome, {**result, "time": time.time()})
        if copy is not None:
            copy.push()
    shutil.rmtree(folder.path / HIDDEN, ignore_errors=True)
    return folder.path


def train_loop_per_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """One worker's part: its streams, its model under the strategy, and the loop.

    Args:
        payload: The config with absolute paths, the run's folder, what every checkpoint carries,
            the ledger of heartbeats, and who disturbs.

    Returns:
        Why the run ended, where it stands, and an error that is the same on every worker.
    """
    import ray.train

    from ray_jobs.heartbeat import Heart

    context = ray.train.get_context()
    heart = Heart(payload["ledger"], context.get_world_rank(), context.get_world_size())
    try:
        return _train(payload, heart, context.get_local_world_size())
    except InputError as error:
        # Found by one worker alone: started again, it would be found again.
        heart.fail(str(error))
        raise
    except Exception as error:
        if fault := full_disk(error, payload["folder"]):
            heart.fail(fault)
        raise
    finally:
        heart.stop()


def full_disk(error: Exception, folder: str) -> str | None:
    """What a failed write says, where the disk is full or may not be written; else None.

    safetensors' own errors carry the system's number in their text alone.
    """
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    if number not in DISK_FULL:
        return None
    place = getattr(error, "filename", None) or folder
    return f"{place}: cannot be written ({os.strerror(number)}); free space there"


def _train(payload: dict[str, Any], heart: Heart, local_workers: int) -> dict[str, Any]:
    import torch
    from ray.train.torch import get_device

    from fusion.training import loop
    from fusion.training.agreed import AgreedError, agreed
    from fusion.training.strategy import build_strategy
    from ray_jobs.session import listen, name_rows, open_session

    config, folder = run_config.from_dump(payload["config"]), RunFolder(Path(payload["folder"]))
    share = len(os.sched_getaffinity(0)) // local_workers
    # Runs beside this one (trials of a search) have cores of their own if each says how many.
    torch.set_num_threads(max(1, int(config.scaling.resources_per_worker.get("CPU", share))))
    torch.backends.cudnn.deterministic = True
    heart.beat("strategy")
    try:
        scaling = config.scaling
        strategy = build_strategy(scaling.strategy, get_device(), scaling.offload)
    except InputError as error:  # alike on every worker
        return {"ending": None, "error": str(error)}
    heart.beat("opening")
    try:
        session = agreed(strategy, lambda: open_session(config, folder, strategy, STOP))
    except AgreedError as error:
        return {"ending": None, "error": str(error)}
    session.document = payload["document"]
    reader = session.train.reader  # type: ignore[attr-defined]
    listen(session, heart, folder)
    payload["observer"](session)
    result: dict[str, Any] = {"ending": None, "error": None}
    heart.beat("start")
    try:
        result["ending"] = loop.fit(session)
    except loop.NonFiniteLossError as error:
        named = name_rows(reader, error.rows)
        result["error"] = f"{error} ({named})" if named else str(error)
    except AgreedError as error:
        result["error"] = full_disk(error, payload["folder"]) or str(error)
    return {**result, **session.progress.dump()}


def _fit(
    config: RunConfig,
    folder: RunFolder,
    document: dict[str, Any],
    lost: tuple[str, int] | None,
    observer: Observer,
) -> dict[str, Any]:
    """Train; start again by itself on the nodes that stay, where one is taken away."""
    from ray_jobs.heartbeat import Pulse

    stop, pulse = folder.path / STOP, Pulse(lost)
    try:
        while True:
            stop.unlink(missing_ok=True)
            trainer = _trainer(config, folder, document, pulse, observer)
            fit = supervise.Supervised(trainer.fit, config, folder, stop, pulse)
            fit.watch = observer.watch
            result: dict[str, Any] = fit.wait().return_value
            if result["error"]:
                raise InputError(f"{config.name}: {result['error']}")
            if result["ending"] != "interrupted":
                return result
            if fit.asked != "drain":
                asked = fit.asked or "asked to end"
                left = f"{config.name}: {asked}: checkpoint written; the same command goes on"
                kind = supervise.Terminated if fit.asked == "SIGTERM" else KeyboardInterrupt
                raise kind(left)
            pulse.lost("a node was about to be taken away")
    finally:
        pulse.close()
        stop.unlink(missing_ok=True)


def _trainer(
    config: RunConfig,
    folder: RunFolder,
    document: dict[str, Any],
    pulse: Pulse,
    observer: Observer,
) -> Any:
    from ray import train

    from ray_jobs.witness import Trainer, Witness

    scaling = config.scaling
    elastic = (
        {}
        if scaling.least == scaling.most
        else {"elastic_resize_monitor_interval_s": scaling.resize_every_s}
    )
    return Trainer(
        train_loop_per_worker,
        train_loop_config={
            "config": supervise.absolute_paths(config.model_dump()),
            "folder": str(folder.path),
            "document": document,
            "ledger": pulse.ledger,
            "observer": observer.session,
        },
        scaling_config=train.ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker=dict(scaling.resources_per_worker) or None,
            **elastic,
        ),
        # Ray resumes by name; our own checkpoints say where a run stands, so no name comes twice.
        run_config=train.RunConfig(
            name=f"start-{time.time_ns()}",
            storage_path=str(folder.path / HIDDEN),
            failure_config=train.FailureConfig(max_failures=scaling.max_failures),
            callbacks=[Witness(pulse.ledger)],
        ),
    )
