"""From a run's config to one worker's session of the loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.cache import folder_of
from data.loader import open_stream
from data.manifest import Manifest
from fusion import registry
from fusion.tasks import Task
from fusion.training import loop
from fusion.training.embeddings import ImageRows, Source
from fusion.training.flops import count_flops
from fusion.training.metrics_log import MetricsLog, Silent
from ray_jobs import mirror
from ray_jobs.heartbeat import Watched
from ray_jobs.predicted import spec_of
from ray_jobs.recovery import Recovery
from ray_jobs.supervise import stop_flag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from data.loader import BatchLoader
    from data.reader import ShardReader
    from fusion.model import FusionModel
    from fusion.training.progress import Progress
    from fusion.training.strategy import Strategy
    from ray_jobs.config import RunConfig
    from ray_jobs.heartbeat import Heart
    from ray_jobs.runs import RunFolder

NAMED_ROWS = 32


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
        InputError: Shards, `optim.group_lr`, `train.cache_embeddings` or `init_from` do not fit.
    """
    cached = config.train.cache_embeddings

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
            pixels=not cached,
        )

    task = Task(spec_of(config))
    kind = registry.get(config.model.name)  # type: ignore[attr-defined]
    settings = loop.Settings(config.train, config.optim, config.checkpoint, config.seed)

    def factory() -> FusionModel:
        return kind(config.model, task.spec)

    loop.prepare(strategy, factory, settings)
    session = loop.Session(
        strategy,
        task,
        settings,
        stream("train"),
        stream("val"),
        folder.path,
        log=MetricsLog(folder.metrics) if strategy.rank == 0 else Silent(),
        init_from=config.init_from,
        stop_requested=stop_flag(folder.path / stop, strategy.rank),
        # Of use beside a GPU's peak only, a few seconds' work, and of a model that runs whole.
        flops=(lambda image_size: count_flops(factory, task, config.train, image_size))
        if strategy.device.type == "cuda" and not cached
        else None,
        embeddings=_embeddings(config) if cached else None,
    )
    if (copy := mirror.of(config, folder.path)) is not None:
        session.saver.on_written, session.saver.on_removed = copy.written, copy.removed
    return session


def _embeddings(config: RunConfig) -> Source:
    """What the outputs of a frozen image encoder are made from."""
    batches = config.data.batches
    manifest = Manifest.load(config.data.shards)

    def images(split: str) -> ImageRows:
        # As evaluation sees them; the config's own check says that training sees the same.
        loader = open_stream(
            config.data.shards, split, batches, batch_size=1, seed=0, train=False, rows="partial"
        )
        rows = loader.reader.rows_of(split)
        return ImageRows(rows[loader.reader.has_cxr[rows]], loader.read)

    return Source(
        folder_of(batches.cache_dir) / "embeddings",
        {split: images(split) for split in ("train", "val")},
        {
            "manifest": manifest.digest,
            "preset": config.preset,
            "image": batches.image.model_dump(include={"resize", "size"}),
        },
    )


def listen(session: loop.Session, heart: Heart, folder: RunFolder) -> None:
    """Let the heart hear every beat of a session's loop; worker 0 also writes what was lost."""
    log = session.log
    recovery = Recovery(heart, log, folder) if isinstance(log, MetricsLog) else None

    def beat(stage: str, progress: Progress) -> None:
        heart.beat(stage, progress)
        if recovery is not None:
            recovery.beat(progress)

    session.beat = beat
    session.val = Watched(session.val, lambda: beat("validation", session.progress))


def name_rows(reader: ShardReader, rows: Sequence[int]) -> str:
    """The ids of rows of the shards: of their stays, else of their images, else admissions."""
    kinds = ("stay_id", "dicom_id", "hadm_id")
    named: dict[str, list[str]] = {kind: [] for kind in kinds}
    for key in reader.keys().select(kinds).take(list(rows[:NAMED_ROWS])).to_pylist():
        kind = next(kind for kind in kinds if key[kind] is not None)
        named[kind].append(str(key[kind]))
    return "; ".join(f"{kind} {', '.join(ids)}" for kind, ids in named.items() if ids)
