"""`rayfuse plan`: what a run will need of which machines, before any of them is asked for."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from data.errors import InputError
from data.tasks import TaskSpec
from fusion import registry
from fusion.planning import machines as m
from fusion.planning.dry import Rows, dry_step
from fusion.planning.options import Option, gib, key_to_change, layouts, recommend, weigh
from fusion.planning.shapes import Llama, LlamaConfig
from fusion.planning.shapes import shape as known_shape
from fusion.tasks import Task
from fusion.training.config import TrainConfig
from fusion.training.optim import OptimConfig
from ray_jobs import plan_machines
from ray_jobs.plan_cohort import accumulations, cuts, read_cohort, texts_of
from ray_jobs.predicted import spec_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fusion.model import FusionModel
    from fusion.planning.dry import Step
    from fusion.planning.machines import Machines
    from fusion.planning.options import Cut
    from ray_jobs.config import RunConfig
    from ray_jobs.plan_cohort import Cohort, Texts


@dataclass(frozen=True)
class Plan:
    """All options of a run on some machines.

    Attributes:
        head: Lines on what was reckoned with.
        options: In the order of the table.
        best: The one to take of each way of tuning, where one fits.
        change: The single key after which something would fit; None where none is enough.
        steps: Of the whole run; 0 if not known.
        disk: What the run's folder and each node's cache will hold.
    """

    head: tuple[str, ...]
    options: tuple[Option, ...]
    best: tuple[Option, ...]
    change: str | None
    steps: int
    disk: str


def plan_run(config: RunConfig, machines: Machines) -> Plan:
    """The options of a run.

    Raises:
        InputError: There are no shards, or the model's memory cannot be reckoned.
    """
    spec = spec_of(config)
    kind = registry.get(config.model.name)  # type: ignore[attr-defined]
    cohort = read_cohort(config, spec)
    # The values of weights take no part.
    bare = {name: None for name in ("image_weights",) if hasattr(config.model, name)}
    block = config.model.model_copy(update=bare)
    with torch.device("meta"):
        model = kind(block, spec)
    texts = texts_of(cohort, model, spec)

    def options(train: TrainConfig, machines: Machines) -> list[Option]:
        share = -(-train.batch_size // machines.world)
        account = functools.partial(
            dry_step,
            lambda: kind(block, spec),
            Task(spec),
            train,
            config.optim,
            cpu=machines.gpu is None,
        )
        ways = cuts(cohort, texts, train, share, config.data.batches.image.size)
        steps = [(cut, functools.partial(account, rows)) for cut, rows in ways]
        return _options(steps, machines, train.precision)

    found = options(config.train, machines)
    best, change = _best(found), None
    if not best:
        change = key_to_change(_changes(config.train, machines, options))
    per_epoch = -(-cohort.rows // config.train.batch_size)
    head = (
        f"{config.name}: {config.model.name}, "  # type: ignore[attr-defined]
        f"{sum(each.numel() for each in model.parameters()):,} parameters, "
        f"{config.train.precision}, {config.train.batch_size} rows a step on {machines.world} "
        "worker(s)",
        "data: " + ", ".join(_data_in_words(cohort, texts, model, config)),
        plan_machines.in_words(machines, config.train.precision),
    )
    state, moments = _saved(model), found[0].memory.resident["moments"]
    keep = config.checkpoint.num_to_keep
    checkpoints = (keep + 1) * (state + moments) + 2 * state
    disk = (
        f"disk: {gib(checkpoints)} in {config.folder} ({keep} checkpoints, one being written, the "
        f"best weights twice); {gib(cohort.cache)} of row cache on each node"
    )
    steps = per_epoch * config.train.trained_epochs
    return Plan(head, tuple(found), best, change, steps, disk)


def plan_shape(
    name: str,
    machines: Machines,
    *,
    sequence: int,
    batch: int,
    lora_rank: int,
    train: TrainConfig,
) -> Plan:
    """The options of fine-tuning a published decoder, whole and with adapters.

    Args:
        name: Of the shape.
        machines: Where.
        sequence: Tokens of a row.
        batch: Rows of a step, over all workers.
        lora_rank: Of the adapters.
        train: Precision and recomputation.

    Raises:
        InputError: The shape is not known, or a number makes no sense.
    """
    if min(sequence, batch, lora_rank) < 1:
        raise InputError("--sequence, --batch and --lora-rank must be 1 or more")
    shape = known_shape(name)
    share = -(-batch // machines.world)
    ways = accumulations(share)

    def options(train: TrainConfig, machines: Machines) -> list[Option]:
        found = []
        for note, rank in (("full", None), (f"lora {lora_rank}", lora_rank)):
            config, cpu = LlamaConfig.of(shape, rank), machines.gpu is None
            account = functools.partial(_rows_step, config, train, sequence, cpu)
            steps = [(cut, functools.partial(account, cut.rows)) for cut in ways]
            found += _options(steps, machines, train.precision, note)
        return found

    found = options(train, machines)
    best, change = _best(found), None
    if not best:
        change = key_to_change(_changes(train, machines, options, of_run=False))
    head = (
        f"{name}: {shape.layers} layers of width {shape.hidden}, {sequence} tokens a row, {batch} "
        f"rows a step, {train.precision}" + (", recomputing" if train.recompute else ""),
        f"numbers: {shape.source}",
        plan_machines.in_words(machines, train.precision),
    )
    full = found[0].memory.resident["weights"]
    disk = (
        f"disk: a checkpoint of full fine-tuning {gib(3 * full)}, of adapters the base's "
        f"weights and {gib(_moments(found, 'lora'))} of moments"
    )
    return Plan(head, tuple(found), best, change, 0, disk)


def _rows_step(
    config: LlamaConfig, train: TrainConfig, sequence: int, cpu: bool, rows: int, inputs_kept: bool
) -> Step:
    shape = functools.partial(_shape_step, config, train, sequence, cpu, inputs_kept)
    return shape(1).extended(shape(2), rows)


@functools.cache
def _shape_step(
    config: LlamaConfig, train: TrainConfig, sequence: int, cpu: bool, inputs_kept: bool, rows: int
) -> Step:
    spec = TaskSpec(name="plan", kind="binary", labels=("one",))
    return dry_step(
        lambda: Llama(config, spec),
        Task(spec),
        train,
        OptimConfig(),
        Rows((sequence,) * rows),
        cpu=cpu,
        update=cpu,
        inputs_kept=inputs_kept,
    )


def shape_training(precision: str, *, recompute: bool) -> TrainConfig:
    """The training block of a shape.

    Raises:
        InputError: The precision is none.
    """
    if precision not in ("fp32", "bf16"):
        raise InputError(f"--precision: {precision!r}; choose bf16 or fp32")
    return TrainConfig.model_validate({"precision": precision, "recompute": recompute})


def _options(
    steps: Sequence[tuple[Cut, Callable[..., Step]]],
    machines: Machines,
    precision: str,
    note: str = "",
) -> list[Option]:
    base = m.HOST_BASE if machines.gpu is not None else plan_machines.process_base()
    # Of equal cuts the last; an account under ZeRO-3 takes a dry step of its own.
    by_count = {cut.count: (cut, functools.cache(account)) for cut, account in steps}
    found = []
    for layout in layouts(machines.world, gpu=machines.gpu is not None, counts=sorted(by_count)):
        cut, account = by_count[layout.accumulation]
        step = account(inputs_kept=layout.inputs_kept)
        found.append(weigh(layout, cut, step, machines, precision, base, note))
    return found


def _data_in_words(
    cohort: Cohort, texts: Texts | None, model: FusionModel, config: RunConfig
) -> Iterator[str]:
    yield f"{cohort.rows:,} training rows"
    if "cxr" in model.modalities:
        yield f"{cohort.images:.0%} with an image of {config.data.batches.image.size} px"
    if "ehr" in model.modalities:
        lengths = cohort.lengths
        yield f"series of {int(np.median(lengths))} steps (longest {lengths[-1]})"
    if texts is not None:
        lengths = texts.lengths
        yield f"texts of {int(np.median(lengths))} tokens (longest {lengths[-1]})"
    if "labs" in model.modalities:
        yield f"up to {cohort.lab_columns} lab columns"


def _saved(model: FusionModel) -> int:
    """Bytes of what a checkpoint holds of the weights: all but those that it names a source of."""
    named = {name for each in model.references().values() for name in each.names}
    state = model.state_dict().items()
    return sum(value.numel() * value.element_size() for name, value in state if name not in named)


def _best(options: Sequence[Option]) -> tuple[Option, ...]:
    """What to take of each way of tuning, where something fits."""
    tunings = dict.fromkeys(option.note for option in options)
    groups = [[option for option in options if option.note == note] for note in tunings]
    return tuple(best for group in groups if (best := recommend(group)) is not None)


def _changes(
    train: TrainConfig,
    machines: Machines,
    options: Callable[[TrainConfig, Machines], Sequence[Option]],
    *,
    of_run: bool = True,
) -> list[tuple[str, Callable[[], Sequence[Option]]]]:
    """Single changes that may help, the cheapest first."""
    changes: list[tuple[str, Callable[[], Sequence[Option]]]] = []
    if not train.recompute:
        more = train.model_copy(update={"recompute": True})
        key = "train.recompute=true" if of_run else "--recompute"
        changes.append((key, lambda: options(more, machines)))
    if train.precision == "fp32":
        half = train.model_copy(update={"precision": "bf16"})
        changes.append(("train.precision=bf16", lambda: options(half, machines)))
    for factor in (2, 4, 8):
        wider = replace(machines, nodes=machines.nodes * factor)
        if wider.world <= train.batch_size or not of_run:
            workers = f"scaling.num_workers={wider.world}"
            key = workers if of_run else f"--nodes {wider.nodes}"
            changes.append((key, lambda wider=wider: options(train, wider)))  # type: ignore[misc]
    return changes


def _moments(options: Sequence[Option], note: str) -> int:
    chosen = next(option for option in options if option.note.startswith(note))
    return chosen.memory.resident["moments"]
