"""From a run's config to one worker's session of the loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.loader import open_stream
from data.tasks import task_spec
from fusion import registry
from fusion.tasks import Task
from fusion.training import loop
from fusion.training.initialise import initial_weights
from fusion.training.metrics_log import MetricsLog, Silent
from ray_jobs.supervise import stop_flag

if TYPE_CHECKING:
    from data.loader import BatchLoader
    from fusion.training.strategy import Strategy
    from ray_jobs.config import RunConfig
    from ray_jobs.runs import RunFolder


def open_session(
    config: RunConfig, folder: RunFolder, strategy: Strategy, stop: str
) -> loop.Session:
    """One worker's session: its shares of the shards, its model prepared under the strategy.

    Args:
        config: With absolute paths.
        folder: The run's.
        strategy: Knows this worker and the others.
        stop: Name of the file in the folder that asks for a checkpoint and an end.

    Raises:
        InputError: Shards, `optim.group_lr` or `init_from` do not fit.
    """

    def stream(split: str) -> BatchLoader:
        return open_stream(
            config.data.shards,
            split,
            config.data.batches,
            batch_size=config.train.batch_size,
            seed=config.seed,
            train=split == "train",
            rank=strategy.rank,
            world_size=strategy.world,
            drop_last=split == "train" and config.train.drop_last,
        )

    task = Task(task_spec(config.task))
    kind = registry.get(config.model.name)  # type: ignore[attr-defined]
    settings = loop.Settings(config.train, config.optim, config.checkpoint, config.seed)
    loop.prepare(strategy, lambda: kind(config.model, task.spec), settings)
    return loop.Session(
        strategy,
        task,
        settings,
        stream("train"),
        stream("val"),
        folder.path,
        log=MetricsLog(folder.metrics) if strategy.rank == 0 else Silent(),
        initial=lambda shapes: initial_weights(shapes, config.init_from),
        stop_requested=stop_flag(folder.path / stop, strategy.rank),
    )
