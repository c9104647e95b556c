"""A training step of a model without its weights: what it allocates, what it computes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from data.schema import MODALITIES, N_FEATURES, Batch
from fusion.planning.ledger import Ledger, Packing, convolution_scratch, keeping_inputs, size_of
from fusion.training.objective import N_PATTERNS, MicroBatch, Objective
from fusion.training.optimizers import build_optimizers, freeze, phase_parameters, train_mode
from fusion.training.recompute import recompute

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from data.tasks import TaskSpec
    from fusion.model import FusionModel
    from fusion.planning.ledger import Stage
    from fusion.tasks import Task
    from fusion.training.config import TrainConfig
    from fusion.training.optim import OptimConfig


@dataclass(frozen=True)
class Rows:
    """What a micro-batch holds.

    Attributes:
        lengths: Steps of each row's series.
        images: Rows that have an image; the first ones.
        image_size: Pixels of its side.
        texts: The note and the results of each row, for models that read text; () has none.
        lab_columns: Of the lab matrix; 0 has none.
    """

    lengths: tuple[int, ...]
    images: int = 0
    image_size: int = 32
    texts: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    lab_columns: int = 0

    def batch(self, task: TaskSpec) -> Batch:
        """A batch of these shapes; its values mean nothing."""
        rows, steps = len(self.lengths), max(self.lengths)
        lab_rows = rows if self.lab_columns else 0
        noted = [row for row, (note, _) in enumerate(self.texts) if note]
        with unset_fake_temporarily():
            notes_index = torch.tensor(noted, dtype=torch.int64)  # models read it by value
        present = {name: torch.zeros(rows, dtype=torch.bool) for name in MODALITIES}
        return Batch(
            ehr=torch.empty(rows, steps, N_FEATURES),
            lengths=torch.empty(rows, dtype=torch.int64),
            cxr=torch.empty(self.images, 3, self.image_size, self.image_size),
            cxr_index=torch.empty(self.images, dtype=torch.int64),
            present=present,
            targets=torch.empty(rows, len(task.labels)),
            cxr_targets=torch.empty(self.images, 14),
            rows=np.zeros(rows, np.int64),
            notes=tuple(self.texts[row][0] for row in noted),
            notes_index=notes_index,
            lab_texts=tuple(results for _, results in self.texts),
            labs=torch.empty(lab_rows, self.lab_columns),
            labs_observed=torch.empty(lab_rows, self.lab_columns, dtype=torch.bool),
            draws=np.zeros(rows, np.uint64),
        )


@dataclass(frozen=True)
class Step:
    """What one worker's step takes, in bytes and FLOPs.

    Attributes:
        parameters: How many there are.
        weights: Of all parameters.
        buffers: Of all buffers.
        gradients: Of all trainable parameters.
        largest_gradient: Of the largest trainable parameter.
        inputs: Of one micro-batch.
        working: Most bytes of activations and temporaries in each stage.
        growing: Most bytes of those and of the gradients that exist by then.
        largest: Of the largest parameter.
        flops: Of one micro-batch's passes, forward and backward, in all phases.
    """

    parameters: int
    weights: int
    buffers: int
    gradients: int
    largest_gradient: int
    inputs: int
    working: dict[Stage, int]
    growing: dict[Stage, int]
    largest: int
    flops: int

    def extended(self, double: Step, rows: int) -> Step:
        """The account of `rows` equal rows, from this one of one row and that of two.

        Everything that depends on rows is linear in them.
        """

        def line(one: int, two: int) -> int:
            return one + (rows - 1) * (two - one)

        return replace(
            self,
            inputs=line(self.inputs, double.inputs),
            working={stage: line(n, double.working[stage]) for stage, n in self.working.items()},
            growing={stage: line(n, double.growing[stage]) for stage, n in self.growing.items()},
            flops=line(self.flops, double.flops),
        )


def dry_step(
    factory: Callable[[], FusionModel],
    task: Task,
    train: TrainConfig,
    optim: OptimConfig,
    rows: Rows,
    *,
    cpu: bool = True,
    update: bool = True,
    inputs_kept: bool = False,
) -> Step:
    """Run one worker's step over a micro-batch without allocating anything.

    Args:
        factory: Builds the model.
        task: The loss.
        train: Precision, memory format.
        optim: What is frozen, which optimizer.
        rows: The micro-batch.
        cpu: Count what oneDNN holds beside the tensors.
        update: Run the optimizers too.
        inputs_kept: Linear layers keep their inputs, as under ZeRO-3.

    Raises:
        InputError: `optim.group_lr` does not fit, or the model's shapes depend on values.
    """
    ledger = Ledger(rows.lengths, convolution_scratch if cpu and not train.channels_last else None)
    with torch.device("meta"):
        model = factory()
    if train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    freeze(model, optim)
    train_mode(model)
    if train.recompute:
        recompute(model)
    with FakeTensorMode():
        _place(model)
        batch = rows.batch(task.spec)
        objective = Objective(model, task, train)
        optimizers = build_optimizers(model, model.phases, optim)
        for phase, optimizer in zip(model.phases, optimizers, strict=True):
            if update:
                _make_moments(phase_parameters(model, phase).values(), optimizer, ledger)
        ledger.own(_state(model, batch, optimizers), "state")
        linear = keeping_inputs() if inputs_kept else nullcontext()
        with Packing(), linear, ledger, gradients_noted(model, ledger):
            counts = torch.ones(N_PATTERNS + len(model.counted), dtype=torch.float64)
            ledger.own([counts], "state")
            for phase, optimizer in zip(model.phases, optimizers, strict=True):
                model.zero_grad(set_to_none=True)
                with ledger.stage("forward"):
                    loss, sums = objective(MicroBatch(batch), counts, phase)
                with ledger.stage("backward"):
                    loss.backward()
                del loss, sums
                if update:
                    with ledger.stage("update"):
                        optimizer.step()
        trained = [size_of(each) for each in model.parameters() if each.requires_grad]
        inputs = [batch.ehr, batch.cxr, batch.labs, batch.targets, batch.cxr_targets]
        return Step(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            weights=sum(size_of(parameter) for parameter in model.parameters()),
            buffers=sum(size_of(buffer) for buffer in model.buffers()),
            gradients=sum(trained),
            largest_gradient=max(trained),
            inputs=sum(size_of(value) for value in inputs),
            working=dict(ledger.working),
            growing=dict(ledger.growing),
            largest=max(size_of(parameter) for parameter in model.parameters()),
            flops=ledger.flops,
        )


def _place(model: nn.Module) -> None:
    """Move a model from the meta device to one that operations take for a CPU."""
    moved: dict[int, Any] = {}
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(old) not in moved:
                new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype)
                moved[id(old)] = torch.nn.Parameter(new, requires_grad=old.requires_grad)
            setattr(module, name, moved[id(old)])
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            empty = torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype)
            setattr(module, name, empty)


class gradients_noted:  # noqa: N801
    """Inside, a gradient counts as such from the moment it is whole."""

    def __init__(self, model: nn.Module, ledger: Ledger) -> None:
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda each: ledger.own([each.grad], "gradient")
            )
            for parameter in model.parameters()
            if parameter.requires_grad
        ]

    def __enter__(self) -> None:
        """Nothing: the hooks are on."""

    def __exit__(self, *exception: object) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def _make_moments(parameters: object, optimizer: Optimizer, ledger: Ledger) -> None:
    for parameter in parameters:  # type: ignore[attr-defined]
        parameter.grad = torch.empty_like(parameter)
    with ledger, ledger.stage("update"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for stage in ledger.working:
        ledger.working[stage] = ledger.growing[stage] = 0


def _state(model: nn.Module, batch: Batch, optimizers: list[Optimizer]) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    yield from (batch.ehr, batch.lengths, batch.cxr, batch.cxr_index, *batch.present.values())
    yield from (batch.labs, batch.labs_observed, batch.targets, batch.cxr_targets)
    for optimizer in optimizers:
        for slots in optimizer.state.values():
            yield from (value for value in slots.values() if isinstance(value, torch.Tensor))
