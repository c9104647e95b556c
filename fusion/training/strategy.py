"""How a model lives on its workers. The loop knows only the protocol, never a strategy's name.

`single` and `ddp` hold everything on every worker; ZeRO (zero.py) shards it.
"""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, distributed, nn

from data.errors import InputError
from fusion import placement
from fusion.training import batch_norm
from fusion.training.optimizers import build_optimizers, phase_parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from torch.optim import Optimizer

    from data.schema import Batch
    from fusion.model import FusionModel, Output
    from fusion.placement import Placement
    from fusion.training.config import Offload, StrategyName, TrainConfig
    from fusion.training.objective import Objective
    from fusion.training.optim import OptimConfig

T = TypeVar("T")


class Strategy(Protocol):
    """What the loop asks of a way to distribute."""

    rank: int
    world: int
    device: torch.device
    model: FusionModel
    """The model itself, unwrapped."""
    optimizers: list[Optimizer]
    """Those whose groups' rates the schedule sets."""

    def build(self, factory: Callable[[], FusionModel], config: TrainConfig) -> FusionModel:
        """Build the model on this worker's device."""
        ...

    def shapes(self) -> dict[str, torch.Size]:
        """The whole shape of every parameter and persistent buffer, by name."""
        ...

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill parameters and buffers, whole, by name; after `build`, before `prepare`."""
        ...

    def whole(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Around reading and running a submodule alone; after `build`, before `prepare`.

        Every worker enters and leaves it.
        """
        ...

    def prepare(self, objective: Objective, config: OptimConfig) -> None:
        """Make the optimizers, wrap the objective; every worker has equal weights after."""
        ...

    def forward(self, *inputs: Any) -> Any:
        """The wrapped objective's forward pass."""
        ...

    def infer(self, batch: Batch) -> Output:
        """The model's forward pass, for evaluation; every worker runs as many."""
        ...

    def accumulate(self, phase: int, last: bool) -> AbstractContextManager[Any]:
        """Around one micro-batch of a phase; its gradients are whole after the last one."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients those of a loss whose sum over workers is the step's."""
        ...

    def step(self, phase: int) -> None:
        """One update of a phase's optimizer."""
        ...

    def clip(self, phase: int, limit: float | None) -> Tensor:
        """The global norm of a phase's gradients, scaled down to `limit` where it is larger."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over workers, on this worker's device."""
        ...

    def gather(self, value: T) -> list[T]:
        """Every worker's value, in rank order, on every worker."""
        ...

    def share(self, value: T) -> T:
        """Worker 0's value."""
        ...

    def align(self) -> None:
        """Give every worker the buffers of worker 0, before they are evaluated."""
        ...

    def weights(self, skip: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """The parameters and persistent buffers that this worker owns, whole, by name.

        Every worker runs it to its end: a sharded tensor is gathered for its owner, and may be
        freed when the next one is asked for.

        Args:
            skip: Names to leave out (and not to gather), the same on every worker.
        """
        ...

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """The optimizers' slots of the parameters that this worker owns, as `weights`.

        Keys: <slot>/<phase>/<parameter>; slots are exp_avg, exp_avg_sq, step.
        """
        ...

    def load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the optimizers' slots that any strategy on any number of workers gave.

        After `prepare`.

        Raises:
            InputError: They are of another model.
        """
        ...


def owner(name: str, world: int) -> int:
    """The worker that saves a parameter or buffer: a hash of its name, the same everywhere."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % world


class Single:
    """One worker."""

    rank = 0
    world = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.model: FusionModel
        self.optimizers: list[Optimizer] = []
        self._wrapped: nn.Module

    def build(self, factory: Callable[[], FusionModel], config: TrainConfig) -> FusionModel:
        """Build the model on this worker's device."""
        with placement.placing(self._placement()):
            model = factory().to(self.device)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.model = model
        return model

    def _placement(self) -> Placement:
        return placement.Whole(self.device)

    def shapes(self) -> dict[str, torch.Size]:
        """The whole shape of every parameter and persistent buffer, by name."""
        return {name: value.shape for name, value in self.model.state_dict().items()}

    @torch.no_grad()
    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill parameters and buffers by name."""
        own = self.model.state_dict()
        for name, value in tensors.items():
            own[name].copy_(value)

    def whole(self, module: nn.Module) -> AbstractContextManager[Any]:
        """It is whole as it is."""
        return nullcontext()

    def prepare(self, objective: Objective, config: OptimConfig) -> None:
        """Make the optimizers, wrap the objective."""
        self.optimizers = build_optimizers(self.model, self.model.phases, config)
        self._wrapped = objective

    def forward(self, *inputs: Any) -> Any:
        """The wrapped objective's forward pass."""
        return self._wrapped(*inputs)

    def infer(self, batch: Batch) -> Output:
        """The model's forward pass, for evaluation."""
        output: Output = self.model(batch)
        return output

    def accumulate(self, phase: int, last: bool) -> AbstractContextManager[Any]:
        """Nothing travels."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, phase: int) -> None:
        """One update of a phase's optimizer."""
        self.optimizers[phase].step()

    def clip(self, phase: int, limit: float | None) -> Tensor:
        """The global norm of a phase's gradients, scaled down to `limit` where it is larger."""
        parameters = phase_parameters(self.model, self.model.phases[phase]).values()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if limit is not None:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself, on this worker's device."""
        return tensor.to(self.device)

    def gather(self, value: T) -> list[T]:
        """The value alone."""
        return [value]

    def share(self, value: T) -> T:
        """The value."""
        return value

    def align(self) -> None:
        """Nothing to align."""

    def weights(self, skip: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """This worker's part of parameters and buffers."""
        for name, value in self.model.state_dict().items():
            if name not in skip and owner(name, self.world) == self.rank:
                yield name, value

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """This worker's part of the optimizers' slots."""
        for phase, optimizer in zip(self.model.phases, self.optimizers, strict=True):
            for name, parameter in phase_parameters(self.model, phase).items():
                if owner(name, self.world) == self.rank and parameter in optimizer.state:
                    for slot, value in optimizer.state[parameter].items():
                        yield f"{slot}/{phase.name}/{name}", value

    def load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the optimizers' slots.

        Raises:
            InputError: They are of another model.
        """
        unused = set(tensors)
        for phase, optimizer in zip(self.model.phases, self.optimizers, strict=True):
            for name, parameter in phase_parameters(self.model, phase).items():
                tail = f"/{phase.name}/{name}"
                slots = {key[: -len(tail)]: key for key in unused if key.endswith(tail)}
                optimizer.state[parameter] = {
                    slot: tensors[key].clone().to("cpu" if slot == "step" else self.device)
                    for slot, key in sorted(slots.items())
                }
                unused -= set(slots.values())
        refuse_leftovers(unused)


class DataParallel(Single):
    """Every worker holds everything; gradients are averaged (torch's DistributedDataParallel).

    Wants an initialised process group. Batch norms in `per_worker` mode let running statistics
    differ between workers; `align` gives all of them worker 0's.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self.rank = distributed.get_rank()
        self.world = distributed.get_world_size()

    def build(self, factory: Callable[[], FusionModel], config: TrainConfig) -> FusionModel:
        """Build the model on this worker's device."""
        model = super().build(factory, config)
        if config.batch_norm == "synchronised" and self.world > 1:
            # Its own group: the order of its collectives and of the gradients' is not fixed.
            group: Any = distributed.new_group()
            batch_norm.synchronise(model, group)
        return model

    def prepare(self, objective: Objective, config: OptimConfig) -> None:
        """Make the optimizers, wrap the objective; weights become those of worker 0."""
        super().prepare(objective, config)
        self._wrapped = nn.parallel.DistributedDataParallel(
            objective,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
            # A phase, or a step without paired rows, leaves parameters without a gradient.
            find_unused_parameters=True,
        )

    def accumulate(self, phase: int, last: bool) -> AbstractContextManager[Any]:
        """Gradients stay here until the last micro-batch."""
        assert isinstance(self._wrapped, nn.parallel.DistributedDataParallel)
        return nullcontext() if last else self._wrapped.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients; the wrapper averages over workers, so the loss is scaled."""
        super().backward(loss * self.world)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over workers, on this worker's device."""
        total = tensor.detach().to(self.device, copy=True)
        distributed.all_reduce(total)
        return total

    def gather(self, value: T) -> list[T]:
        """Every worker's value, in rank order, on every worker."""
        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value)
        return values

    def share(self, value: T) -> T:
        """Worker 0's value."""
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def align(self) -> None:
        """Give every worker the buffers of worker 0."""
        for _, buffer in sorted(persistent_buffers(self.model).items()):
            distributed.broadcast(buffer, src=0)


def build_strategy(
    name: StrategyName, device: torch.device | str, offload: Offload = "none"
) -> Strategy:
    """The strategy of that name on this worker's device.

    Args:
        name: As a run's `scaling.strategy`.
        device: This worker's.
        offload: What a ZeRO strategy keeps in the host's memory.

    Raises:
        InputError: DeepSpeed cannot work on that device.
    """
    if name == "single":
        return Single(device)
    if name == "ddp":
        return DataParallel(device)
    from fusion.training.zero import Zero

    return Zero(device, stage=int(name[-1]), offload=offload)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the state of a model, by name."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


def refuse_leftovers(unused: Collection[str]) -> None:
    """Refuse entries of a checkpoint that found no place.

    Raises:
        InputError: There are some.
    """
    if unused:
        raise InputError(
            f"the checkpoint holds {min(unused)!r}, which this model has not "
            f"({len(unused)} such entries); continue with the run's own config"
        )
