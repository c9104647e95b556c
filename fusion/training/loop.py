"""The loop: fit, train_step, evaluate_model. It knows FusionModel and Strategy, nothing concrete.

The result of a step is the same on any number of workers and micro-batches, up to rounding: every
term is divided by the rows it counts over the whole step.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from data.errors import InputError
from fusion.training import checkpoint
from fusion.training.agreed import AgreedError
from fusion.training.embeddings import encoder_of
from fusion.training.meter import Meter
from fusion.training.metrics_log import Log, Silent
from fusion.training.objective import MicroBatch, census, cut, groups, placeholder
from fusion.training.optimizers import Schedule, freeze, train_mode
from fusion.training.predict import Predictions, merge, predict, validation_scores
from fusion.training.progress import Progress
from fusion.training.recompute import recompute
from fusion.training.restore import start
from fusion.training.saver import Saver
from fusion.training.speed import Speed
from fusion.training.tracing import Tracer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from data.schema import Batch, BatchStream
    from fusion.model import FusionModel
    from fusion.tasks import Task
    from fusion.training.config import CheckpointConfig, TrainConfig
    from fusion.training.embeddings import Source
    from fusion.training.flops import Flops
    from fusion.training.optim import OptimConfig
    from fusion.training.strategy import Strategy

Ending = Literal["epochs", "patience", "interrupted"]
Stage = Literal["embeddings", "data", "census", "step", "validation", "checkpoint"]


class NonFiniteLossError(AgreedError):
    """A loss or a gradient is NaN or infinite; raised before the update.

    Attributes:
        rows: Of the shards, in the micro-batches concerned.
    """

    def __init__(self, message: str, rows: list[int]) -> None:
        super().__init__(message)
        self.rows = rows


@dataclass(frozen=True)
class Settings:
    """The blocks of a run's config that the loop reads."""

    train: TrainConfig
    optim: OptimConfig
    checkpoint: CheckpointConfig
    seed: int = 0


@dataclass
class Session:
    """One worker's part in a run.

    Attributes:
        strategy: Holds the model that `prepare` built.
        task: The loss and the probabilities.
        settings: The loop's config.
        train: This worker's shares of each training step.
        val: This worker's shares of the validation split.
        folder: Where checkpoints/ and best/ are.
        log: Where metrics go; silent on all workers but the first.
        init_from: Prefix of parameters and buffers -> run folder or weights file that they start
            from, in a run that has no checkpoint; frozen ones come from there in any case.
        document: What every checkpoint's meta.json carries (the resolved config, versions).
        stop_requested: Asked before each step on every worker; True on any ends the run with a
            checkpoint.
        after_validation: Called on every worker with the validation's values.
        beat: Told on every worker what it is about to do, and at which step.
        saver: Writes checkpoints and best weights.
        flops: From an image's size to the model's FLOPs, for the log of the speed.
        embeddings: What the outputs of the model's frozen image encoder are made from, where they
            are kept; None where the encoder runs in every step.
        image_shape: Of an image in this session's batches, or of what stands in its place.
    """

    strategy: Strategy
    task: Task
    settings: Settings
    train: BatchStream
    val: BatchStream
    folder: Path
    log: Log = field(default_factory=Silent)
    init_from: Mapping[str, Path] = field(default_factory=dict)
    document: dict[str, Any] = field(default_factory=dict)
    stop_requested: Callable[[], bool] = lambda: False
    after_validation: Callable[[dict[str, float]], None] = lambda values: None
    beat: Callable[[Stage, Progress], None] = lambda stage, progress: None
    progress: Progress = field(default_factory=Progress)
    flops: Callable[[int], Flops] | None = None
    embeddings: Source | None = None
    image_shape: tuple[int, ...] = (3, 32, 32)
    schedule: Schedule = field(init=False)
    saver: Saver = field(init=False)
    meter: Meter = field(default_factory=Meter)
    speed: Speed = field(init=False)
    tracer: Tracer = field(init=False)

    def __post_init__(self) -> None:
        updates = self.settings.train.trained_epochs * self.train.steps_per_epoch
        self.schedule = Schedule(self.settings.optim, updates)
        self.saver = Saver(self.folder, self.strategy, self.settings.checkpoint)
        self.speed = Speed(self.flops)
        traced = self.settings.train.profiled if self.strategy.rank == 0 else None
        self.tracer = Tracer(self.folder / "traces", traced)

    @property
    def filler(self) -> Batch:
        """What is run in place of an empty share."""
        return placeholder(self.task.spec, self.image_shape)


def prepare(
    strategy: Strategy, factory: Callable[[], FusionModel], settings: Settings
) -> FusionModel:
    """Build a model from the seed, alike on every worker.

    Raises:
        InputError: `optim.group_lr` names no parameter, or freezes a whole phase; or
            `train.cache_embeddings` is set and the model's image encoder is not frozen.
    """
    torch.manual_seed(settings.seed)
    model = strategy.build(factory, settings.train)
    freeze(model, settings.optim)
    if settings.train.cache_embeddings:
        encoder_of(model)
    if settings.train.recompute:
        recompute(model)
    checkpoint.seed_worker(settings.seed, strategy.rank)
    return model


def fit(session: Session) -> Ending:
    """Train from where the newest complete checkpoint stands to the end of the run.

    Returns:
        Why it ended. After "interrupted" the same call goes on with the very next step; otherwise
        best/ holds the weights that `train.restore` asks for.

    Raises:
        AgreedError: On every worker: a loss that is not finite, a checkpoint that cannot be written
            or read, or a validation split without a label of both classes. The last checkpoint
            stays as it was.
    """
    try:
        with session.saver:
            start(session)
            return _train(session)
    finally:
        _note_saved(session)


def train_step(
    session: Session, share: Batch | None, counts: Tensor, passes: int | None = None
) -> None:
    """One step: for each phase, forward and backward over the micro-batches, then the update.

    Args:
        session: This worker's.
        share: This worker's rows of the global batch; None where it has none.
        counts: The census of the whole global batch.
        passes: Micro-batches, the same on every worker: the most that any worker's `groups` are.
            None on a single worker.

    Raises:
        NonFiniteLossError: On every worker alike, before the update.
    """
    strategy, settings = session.strategy, session.settings
    own = groups(strategy.model, settings.train, share)
    own += [[]] * ((passes or len(own)) - len(own))
    parts = [
        MicroBatch(part.batch.to(strategy.device, non_blocking=True), part.weight)
        for part in cut(share, own, session.filler)
    ]
    ended = session.progress.epoch + (session.progress.step + 1) / _steps(session)
    phases = [phase.at(ended) for phase in strategy.model.phases]
    for number, phase in enumerate(phases):
        for _ in range(phase.repeats):
            strategy.model.zero_grad(set_to_none=True)
            losses = []
            for part in parts:
                with strategy.accumulate(number, last=part is parts[-1]):
                    loss, sums = strategy.forward(part, counts, phase)
                    strategy.backward(loss)
                losses.append(loss.detach())
                _measure(session, phase.name, sums)
            norm = strategy.clip(number, settings.optim.clip_norm)
            _require_finite(session, parts, torch.stack(losses), norm)
            strategy.step(number)
            if phase is phases[-1]:  # earlier ones, as a critic's, have losses of other kinds
                session.meter.add("loss", torch.stack(losses).sum(), torch.ones_like(norm))


def evaluate_model(session: Session, stream: BatchStream) -> Predictions:
    """Predictions of a whole split, on every worker, in the order of its rows."""
    strategy = session.strategy
    strategy.align()
    own = predict(
        strategy.model,
        stream.epoch(0),
        session.task,
        config=session.settings.train,
        forward=strategy.infer,
        filler=session.filler,
    )
    return merge(strategy.gather(own))


def _train(session: Session) -> Ending:
    """Epochs from the progress to the end of the run."""
    config, progress = session.settings.train, session.progress
    while not progress.finished(config):
        # A run stopped right after a validation does not count it twice.
        if config.evaluate == "before_epoch" and progress.validations <= progress.epoch:
            _validate(session)
            if progress.exhausted(config):
                break
        if not _train_epoch(session):
            return "interrupted"
        if config.evaluate == "after_epoch":
            _validate(session)
        _save(session)
    if config.restore == "last":
        _write_best(session, selected="last")
    return "patience" if progress.exhausted(config) else "epochs"


def _train_epoch(session: Session) -> bool:
    """Steps from the progress to the end of its epoch; False where a stop was asked for."""
    strategy, progress, settings = session.strategy, session.progress, session.settings
    train_mode(strategy.model)
    every = settings.checkpoint.every_steps
    for share in _shares(session):
        session.beat("census", progress)
        _note_saved(session)
        asked = [session.stop_requested(), session.saver.due(), session.saver.failing()]
        wanted = torch.zeros(settings.train.batch_size + settings.train.accumulation)
        wanted[len(groups(strategy.model, settings.train, share))] = 1
        counts = census(share, strategy.model)
        told = [counts, wanted.double(), torch.tensor(asked, dtype=torch.float64)]
        totals = strategy.sum(torch.cat(told))
        stop, due, failed = (totals[-3:] > 0).tolist()
        if failed:
            session.saver.settle()
        if stop:
            session.tracer.close(progress.updates - 1)
            _save(session)
            return False
        session.beat("step", progress)
        session.schedule.apply(strategy.optimizers, progress.updates)
        with session.tracer.step(progress.updates):
            passes = int(totals[len(counts) : -3].nonzero().max())
            train_step(session, share, totals[: len(counts)], passes)
        session.speed.stepped(share)
        progress.step += 1
        progress.updates += 1
        session.meter.steps += 1
        if session.meter.steps == settings.train.log_every_steps:
            _log_training(session)
        asked_for = due or (every and progress.updates % every == 0)
        if asked_for and progress.step < _steps(session):
            _save(session)
    session.tracer.close(progress.updates - 1)
    _log_training(session)
    progress.epoch += 1
    progress.step = 0
    return True


def _shares(session: Session) -> Iterator[Batch | None]:
    """The rest of the epoch; told before each share that it is waited for."""
    progress = session.progress
    session.beat("data", progress)
    for share in session.speed.waited(session.train.epoch(progress.epoch, progress.step)):
        yield share
        session.beat("data", progress)


def _validate(session: Session) -> None:
    """Score the validation split, alike on all workers; keep the weights if they are the best."""
    strategy, progress = session.strategy, session.progress
    session.beat("validation", progress)
    predictions = evaluate_model(session, session.val)
    metric = session.settings.train.selection_metric
    # One worker decides: a sum in another order could tip a comparison.
    try:
        own = validation_scores(predictions, metric)
    except InputError as error:
        raise AgreedError(str(error)) from None
    scores, loss = strategy.share((own, predictions.loss / len(predictions.rows)))
    lowest = session.settings.train.lowest_is_best
    better = progress.record(scores[metric], lowest=lowest)
    session.schedule.step(scores[metric] if lowest else loss)
    session.schedule.apply(strategy.optimizers, progress.updates)
    values = {**scores, "loss": loss, "lr": _rate(session), "rows": len(predictions.rows)}
    session.log.write("val", progress, {**values, "best": better})
    if better and session.settings.train.restore == "best":
        _write_best(session, selected="best")
    session.after_validation({**values, "epoch": progress.epoch, "updates": progress.updates})


def _measure(session: Session, phase: str, sums: dict[str, tuple[Tensor, Tensor]]) -> None:
    alone = len(session.strategy.model.phases) == 1
    for name, (total, rows) in sums.items():
        session.meter.add(name if alone else f"{phase}/{name}", total, rows)


def _require_finite(
    session: Session, parts: list[MicroBatch], losses: Tensor, norm: Tensor
) -> None:
    strategy, progress = session.strategy, session.progress
    finite = torch.isfinite(losses)
    faulty = torch.stack([(~finite).any(), ~torch.isfinite(norm)])
    lost, overflown = strategy.sum(faulty.double()).tolist()
    if not lost and not overflown:
        return
    rows = [
        row
        for part, good in zip(parts, finite.tolist(), strict=True)
        if not good and part.weight
        for row in part.batch.rows.tolist()
    ]
    named = [row for own in strategy.gather(rows) for row in own]
    what = "loss" if lost else "gradient"
    where = f", rows {named[:32]} of the shards" if named else ""
    raise NonFiniteLossError(
        f"the {what} is NaN or infinite at epoch {progress.epoch}, step {progress.step}{where}; "
        "nothing was updated: look at those rows, lower optim.lr or set optim.clip_norm",
        named,
    )


def _log_training(session: Session) -> None:
    meter, session.meter = session.meter, Meter()
    means = meter.means(session.strategy)
    if means:
        means |= _tallied(session)
        of = _steps(session) * session.settings.train.trained_epochs
        values = {**means, "lr": _rate(session), "steps": meter.steps, "of": of}
        session.log.write("train", session.progress, values)
    precision = session.settings.train.precision
    if speed := session.speed.values(session.strategy, precision):
        session.log.write("speed", session.progress, speed)


def _tallied(session: Session) -> dict[str, float]:
    """What all workers' models have read since the last line."""
    read = session.strategy.model.tally()
    if not read:
        return {}
    counts = session.strategy.sum(torch.tensor(list(read.values()), dtype=torch.float64))
    return dict(zip(read, counts.tolist(), strict=True))


def _rate(session: Session) -> float:
    return float(session.strategy.optimizers[0].param_groups[0]["lr"])


def _steps(session: Session) -> int:
    return session.train.steps_per_epoch


def _save(session: Session) -> None:
    session.beat("checkpoint", session.progress)
    _log_training(session)
    session.saver.save(session.progress, session.schedule, session.document)
    _note_saved(session)


def _note_saved(session: Session) -> None:
    """A line for each checkpoint once it is complete: by then training may be further."""
    for written in session.saver.completed():
        event = {"event": "checkpoint", **asdict(written)}
        session.log.write("event", session.progress, event)
        session.log.rotate()


def _write_best(session: Session, selected: Literal["best", "last"]) -> None:
    session.saver.write_best(session.progress, session.document, selected)
