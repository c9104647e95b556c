"""`rayfuse plan`: what a run will need of which machines, before any of them is asked for."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from data.errors import InputError
from data.manifest import Manifest
from data.schema import N_CHANNELS
from data.tasks import TaskSpec, task_spec
from fusion import registry
from fusion.planning import machines as m
from fusion.planning.dry import Rows, dry_step
from fusion.planning.options import (
    Option,
    gib,
    key_to_change,
    layouts,
    recommend,
    weigh,
)
from fusion.planning.shapes import Llama, LlamaConfig
from fusion.planning.shapes import shape as known_shape
from fusion.tasks import Task
from fusion.training.config import TrainConfig
from fusion.training.optim import OptimConfig
from ray_jobs import plan_machines

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fusion.planning.dry import Step
    from fusion.planning.machines import Machines
    from ray_jobs.config import RunConfig

ACCUMULATIONS = (1, 2, 4, 8)
SAMPLED_ROWS = 20_000


@dataclass(frozen=True)
class Cohort:
    """What a run trains on.

    Attributes:
        rows: Training rows of an epoch.
        images: Share of them that has an image.
        lengths: Sorted sample of the lengths of their series.
        cache: Bytes of the shards, and so about of the row cache on each node.
    """

    rows: int
    images: float
    lengths: np.ndarray
    cache: int

    def micro(self, rows: int, image_size: int) -> Rows:
        """An unlucky micro-batch: its longest row is the longest of all, and images are many.

        Images: their mean number and three standard deviations more.
        """
        quantiles = (np.arange(rows) + 0.5) / rows
        lengths = np.quantile(self.lengths, quantiles, method="nearest").astype(int)
        lengths[-1] = self.lengths[-1]
        share = self.images
        images = rows * share + 3 * math.sqrt(rows * share * (1 - share))
        return Rows(tuple(lengths.tolist()), min(rows, math.ceil(images)), image_size)


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
    spec = task_spec(config.task)
    kind = registry.get(config.model.name)  # type: ignore[attr-defined]
    if "notes" in kind.modalities:
        raise InputError(
            f"{config.name}: {kind.name} reads texts, whose lengths are not reckoned with; plan "
            "its language model by `rayfuse plan --shape`"
        )
    cohort = read_cohort(config, spec)
    # The values of weights take no part.
    bare = {name: None for name in ("image_weights",) if hasattr(config.model, name)}
    block = config.model.model_copy(update=bare)
    size = config.data.batches.image.size

    def options(train: TrainConfig, machines: Machines) -> list[Option]:
        share = -(-train.batch_size // machines.world)
        sizes = _micro_sizes(share, train.accumulation)
        steps = {
            rows: dry_step(
                lambda: kind(block, spec),
                Task(spec),
                train,
                config.optim,
                cohort.micro(rows, size),
                cpu=machines.gpu is None,
            )
            for rows in sizes
        }
        return _options(steps, sizes, machines, train.precision)

    found = options(config.train, machines)
    best, change = _best(found), None
    if not best:
        change = key_to_change(_changes(config.train, machines, options))
    per_epoch = -(-cohort.rows // config.train.batch_size)
    whole = found[0].memory.resident
    state = whole["weights"] + whole["buffers"]
    head = (
        f"{config.name}: {config.model.name}, {whole['weights'] // 4:,} parameters, "  # type: ignore[attr-defined]
        f"{config.train.precision}, {config.train.batch_size} rows a step on {machines.world} "
        "worker(s)",
        f"data: {cohort.rows:,} training rows, {cohort.images:.0%} with an image of {size} px, "
        f"series of {int(np.median(cohort.lengths))} steps (longest {cohort.lengths[-1]})",
        plan_machines.in_words(machines, config.train.precision),
    )
    keep = config.checkpoint.num_to_keep
    checkpoints = (keep + 1) * (state + whole["moments"]) + 2 * state
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
    sizes = _micro_sizes(share, 1)

    def options(train: TrainConfig, machines: Machines) -> list[Option]:
        found = []
        for note, rank in (("full", None), (f"lora {lora_rank}", lora_rank)):
            config, cpu = LlamaConfig.of(shape, rank), machines.gpu is None
            one, two = (_shape_step(config, train, sequence, rows, cpu) for rows in (1, 2))
            steps = {rows: one.extended(two, rows) for rows in sizes}
            found += _options(steps, sizes, machines, train.precision, note)
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


@functools.cache
def _shape_step(
    config: LlamaConfig, train: TrainConfig, sequence: int, rows: int, cpu: bool
) -> Step:
    spec = TaskSpec(name="plan", kind="binary", labels=("one",))
    batch = Rows((sequence,) * rows)
    return dry_step(
        lambda: Llama(config, spec), Task(spec), train, OptimConfig(), batch, cpu=cpu, update=cpu
    )


def shape_training(precision: str, *, recompute: bool) -> TrainConfig:
    """The training block of a shape.

    Raises:
        InputError: The precision is none.
    """
    if precision not in ("fp32", "bf16"):
        raise InputError(f"--precision: {precision!r}; choose bf16 or fp32")
    return TrainConfig.model_validate({"precision": precision, "recompute": recompute})


def read_cohort(config: RunConfig, spec: TaskSpec) -> Cohort:
    """What the manifest and the shards say of the training split.

    Raises:
        InputError: There are no finished shards, or no training rows.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    folder, batches = config.data.shards, config.data.batches
    manifest = Manifest.load(folder)
    overlap = manifest.overlap.get("train", {})
    rows, paired = manifest.splits.get("train", 0), overlap.get("cxr", 0)
    if batches.train_rows == "paired":
        rows = paired
    elif spec.unit == "stay":
        rows = paired + round(batches.unpaired_fraction * (rows - paired))
    if not rows:
        raise InputError(f"{folder}: no training rows to plan for; extract more subjects")
    lengths: list[np.ndarray] = []
    column = "ehr_observed"
    for file in manifest.files:
        values = pq.read_table(folder / file.name, columns=[column])[column]
        counts = pc.fill_null(pc.list_value_length(values), 0).to_numpy()
        lengths.append(np.maximum(counts // N_CHANNELS, 1))
        if sum(map(len, lengths)) >= SAMPLED_ROWS:
            break
    sample = np.sort(np.concatenate(lengths))
    if batches.max_steps is not None:
        sample = np.minimum(sample, batches.max_steps)
    return Cohort(
        rows,
        min(1.0, paired / rows) * (1 - batches.withhold_cxr),
        sample,
        sum((folder / file.name).stat().st_size for file in manifest.files),
    )


def _micro_sizes(share: int, accumulation: int) -> dict[int, int]:
    """Rows of a micro-batch -> the fewest micro-batches that have so few, at most."""
    counts = sorted({accumulation, *ACCUMULATIONS, share})
    sizes: dict[int, int] = {}
    for count in counts:
        if count <= share:
            sizes.setdefault(-(-share // count), count)
    return sizes or {1: 1}


def _options(
    steps: dict[int, Step],
    sizes: dict[int, int],
    machines: Machines,
    precision: str,
    note: str = "",
) -> list[Option]:
    found = []
    base = m.HOST_BASE if machines.gpu is not None else plan_machines.process_base()
    by_count = {count: rows for rows, count in sizes.items()}
    gpu = machines.gpu is not None
    for layout in layouts(machines.world, gpu=gpu, accumulations=sorted(by_count)):
        rows = by_count[layout.accumulation]
        found.append(weigh(layout, rows, steps[rows], machines, precision, base, note))
    return found


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
