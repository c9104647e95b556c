"""ZeRO: the optimizer's state, gradients and parameters sharded over the workers, by DeepSpeed.

One engine holds the objective and one optimizer for all phases (two engines cannot hold the same
parameters). DeepSpeed runs in float32; the precision is the objective's own autocast.
"""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.module import register_module_module_registration_hook

from data.errors import InputError
from fusion import placement
from fusion.model import FusionModel
from fusion.training.gradient_order import GradientOrder
from fusion.training.optimizers import PhasedAdam, build_phased_optimizer, phase_parameters
from fusion.training.strategy import DataParallel, owner, refuse_leftovers

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from contextlib import AbstractContextManager

    from data.schema import Batch
    from fusion.model import Output
    from fusion.placement import Placement
    from fusion.training.config import Offload, TrainConfig
    from fusion.training.objective import Objective
    from fusion.training.optim import OptimConfig

BUCKET = 50_000_000
"""Most gradient elements that are reduced at once (200 MB)."""


@dataclass(frozen=True)
class Fragment:
    """Where this worker's shard of a parameter lies.

    Attributes:
        flat: This worker's float32 shard of the parameter's group; the optimizer's state is its.
        start: In `flat`.
        first: In the whole parameter, flattened.
        length: Elements; 0 where this worker holds none of the parameter.
    """

    flat: Tensor
    start: int
    first: int
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """The parameter's part of a tensor laid out as `flat`."""
        return flat.narrow(0, self.start, self.length)


class Root(nn.Module):
    """What the engine wraps: the objective in training, the model alone in evaluation.

    Both go through the engine's module, on which parameters are gathered and released.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, *inputs: Any) -> Any:
        """The objective of its inputs, or the model's output for a batch alone."""
        return self.objective(*inputs) if len(inputs) > 1 else self.objective.model(*inputs)


class Zero(DataParallel):
    """Stage 1 shards the optimizer's state, 2 the gradients too, 3 the parameters too.

    A parameter that a phase updates but a step reaches on no worker has a gradient of zero, so its
    moments decay; the other strategies leave it as it is.
    """

    persistent_elements = 100_000
    """Stage 3: parameters up to this size stay whole on every worker (DeepSpeed's default)."""

    def __init__(
        self, device: torch.device | str, *, stage: int, offload: Offload = "none"
    ) -> None:
        super().__init__(device)
        self.stage = stage
        self.offload = offload
        self._deepspeed = _load(self.device)
        self._client: PhasedAdam
        self._engine: Any
        self._order: GradientOrder
        self._groups: dict[int, int] = {}

    def build(self, factory: Callable[[], FusionModel], config: TrainConfig) -> FusionModel:
        """Build the model; under stage 3 each submodule is sharded as soon as it is complete."""
        # DeepSpeed flattens parameters, so only the images are channels-last.
        config = config.model_copy(update={"channels_last": False})
        if self.stage < 3:
            return super().build(factory, config)
        with _shard_as_built(self._shard):
            model = super().build(factory, config)
        self._shard(model)
        return model

    def _placement(self) -> Placement:
        if self.stage < 3:
            return super()._placement()
        return placement.Sharded(self.device, self.rank, self._shard)

    def shapes(self) -> dict[str, torch.Size]:
        """The whole shape of every parameter and persistent buffer, by name."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        return {
            name: torch.Size(getattr(parameters.get(name), "ds_shape", shape))
            for name, shape in super().shapes().items()
        }

    @torch.no_grad()
    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill parameters and buffers by name; each worker takes its own shard."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        own = self.model.state_dict()
        for name, value in tensors.items():
            shard = getattr(parameters.get(name), "ds_tensor", None)
            if shard is None:
                own[name].copy_(value)
                continue
            first = min(self.rank * shard.numel(), value.numel())
            part = value.flatten()[first : first + shard.numel()]
            shard[: len(part)].copy_(part)

    def whole(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Stage 3 gathers the parameters for the time."""
        if self.stage < 3:
            return super().whole(module)
        gathered: AbstractContextManager[Any] = self._deepspeed.zero.GatheredParameters(
            list(module.parameters())
        )
        return gathered

    def prepare(self, objective: Objective, config: OptimConfig) -> None:
        """Make the optimizer and the engine; weights become those of worker 0."""
        client = build_phased_optimizer(self.model, self.model.phases, config)
        self._groups = {
            id(parameter): number
            for number, group in enumerate(client.param_groups)
            for parameter in group["params"]
        }
        self._client = client
        self.optimizers = [client]
        self._wrapped = Root(objective)
        trainable = sum(
            self.shapes()[name].numel()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        )
        self._engine, *_ = self._deepspeed.initialize(
            model=self._wrapped,
            optimizer=client,
            config=self._config(min(BUCKET, trainable)),
            dist_init_required=False,
        )
        self._order = GradientOrder(
            [list(phase_parameters(self.model, phase).values()) for phase in self.model.phases],
            self._intercept_gradients(),
        )

    def forward(self, *inputs: Any) -> Any:
        """The wrapped objective's forward pass."""
        return self._engine(*inputs)

    def infer(self, batch: Batch) -> Output:
        """The model's forward pass, for evaluation; every worker runs as many."""
        output: Output = self._wrapped(batch)
        return output

    @contextmanager
    def accumulate(self, phase: int, last: bool) -> Iterator[None]:
        """Stage 1 reduces with the last micro-batch, 2 and 3 with each."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._order.start(phase)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients; the engine averages over workers, so the loss is scaled."""
        self._engine.backward(loss * self.world, scale_wrt_gas=False)

    def step(self, phase: int) -> None:
        """One update of a phase's groups."""
        self._client.phase = phase
        self._engine.step()

    @torch.no_grad()
    def clip(self, phase: int, limit: float | None) -> Tensor:
        """The global norm of a phase's gradients, scaled down to `limit` where it is larger."""
        gradients = self._gradients(phase)
        norm = nn.utils.get_total_norm(gradients).to(self.device)
        norm = self.sum(norm.square()).sqrt()
        if limit is not None:
            factor = (limit / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factor.to(gradient.device))
        return norm

    def weights(self, skip: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers that this worker owns; stage 3 gathers one at a time."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, value in self.model.state_dict().items():
            if name in skip:
                continue
            parameter = parameters.get(name)
            if not hasattr(parameter, "ds_id"):
                if owner(name, self.world) == self.rank:
                    yield name, value
                continue
            with self._deepspeed.zero.GatheredParameters([parameter]):
                assert parameter is not None
                whole = parameter.detach().clone() if self._owns(name) else None
            if whole is not None:
                yield name, whole

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """This worker's part of the optimizer's slots, one gathered at a time."""
        for number, phase in enumerate(self.model.phases):
            state = self._client.states[number]
            for name, parameter in phase_parameters(self.model, phase).items():
                fragment = self._fragment(parameter)
                slots = state.get(fragment.flat)
                if not slots:
                    continue
                for slot, value in slots.items():
                    whole = value.clone()
                    if slot != "step":
                        whole = self._assembled(parameter, fragment, value, name)
                    if self._owns(name):
                        yield f"{slot}/{phase.name}/{name}", whole

    def load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the optimizers' slots; each worker takes its own shards.

        Raises:
            InputError: They are of another model, or parameters of one group were not updated
                equally often, of which DeepSpeed keeps one count.
        """
        unused = set(tensors)
        for number, phase in enumerate(self.model.phases):
            state = self._client.states[number]
            for name, parameter in phase_parameters(self.model, phase).items():
                tail = f"/{phase.name}/{name}"
                slots = {key[: -len(tail)]: key for key in unused if key.endswith(tail)}
                unused -= set(slots.values())
                fragment = self._fragment(parameter)
                for slot, key in sorted(slots.items()):
                    own = state[fragment.flat]
                    if slot == "step":
                        if float(own.setdefault("step", tensors[key].clone())) != tensors[key]:
                            raise _unequal(name, float(tensors[key]), float(own["step"]))
                        continue
                    target = own.setdefault(slot, torch.zeros_like(fragment.flat.detach()))
                    whole = tensors[key].flatten()
                    fragment.of(target).copy_(whole.narrow(0, fragment.first, fragment.length))
        refuse_leftovers(unused)

    def _owns(self, name: str) -> bool:
        return owner(name, self.world) == self.rank

    def _shard(self, module: nn.Module) -> None:
        self._deepspeed.zero.Init(module=module, config_dict_or_path=self._config())

    def _config(self, bucket: int = BUCKET) -> dict[str, Any]:
        host = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": 2 * bucket,
                "stage3_param_persistence_threshold": self.persistent_elements,
                # `clip` has computed it; DeepSpeed can do without it in these cases only.
                "compute_grad_norm": self.stage == 3 or self.offload != "none",
                **({} if self.offload == "none" else {"offload_optimizer": host}),
                **({"offload_param": host} if self.offload == "all" else {}),
            },
        }

    def _intercept_gradients(self) -> Callable[[nn.Parameter], None]:
        """Put the order between DeepSpeed's gradient hooks and what they call; gives the latter."""
        zero = self._engine.optimizer
        name = (
            "reduce_ready_partitions_and_remove_grads" if self.stage == 3 else "process_gradients"
        )
        take = getattr(zero, name)
        setattr(zero, name, lambda parameter, *_: self._order.arrive(parameter))
        # At the end of a backward pass, before what is left in the buckets is reduced.
        zero.register_grad_acc_post_hook(lambda: self._order.finish())
        if self.stage == 3:
            return lambda parameter: take(parameter)
        return lambda parameter: take(parameter, self._groups[id(parameter)])

    def _gradients(self, phase: int) -> list[Tensor]:
        """This worker's shards of a phase's gradients, as the step will use them."""
        zero, groups = self._engine.optimizer, self._client.param_groups
        numbers = [number for number, group in enumerate(groups) if phase in group["phases"]]
        flat = zero.fp32_partitioned_groups_flat if self.stage == 3 else None
        if flat is not None:
            of_part = zero.sub_group_to_group_id
            numbers = [part for part in range(len(flat)) if of_part[part] in numbers]
        else:
            flat = zero.single_partition_of_fp32_groups
        if self.offload != "none":
            return [flat[number].grad for number in numbers]
        return [gradient for number in numbers for gradient in zero.averaged_gradients[number]]

    def _fragment(self, parameter: nn.Parameter) -> Fragment:
        zero: Any = self._engine.optimizer
        if self.stage == 3:
            part, start, length = zero.grad_position[zero.get_param_id(parameter)]
            whole: int = parameter.ds_numel  # type: ignore[attr-defined]
            first = min(self.rank * length, whole)
            flat = zero.fp32_partitioned_groups_flat[part]
            return Fragment(flat, start, first, min(length, whole - first))
        flat = zero.single_partition_of_fp32_groups[self._groups[id(parameter)]]
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return Fragment(flat, 0, 0, 0)
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Fragment(flat, here.start, there.start, here.numel)

    def _assembled(
        self, parameter: nn.Parameter, fragment: Fragment, value: Tensor, name: str
    ) -> Tensor:
        """A slot of a parameter from all workers' shards; whole on its owner only."""
        shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
        whole = torch.zeros(shape.numel(), dtype=value.dtype, device=self.device)
        part = whole.narrow(0, fragment.first, fragment.length)
        part.copy_(fragment.of(value))
        distributed.reduce(whole, dst=owner(name, self.world))
        return whole.view(shape)


def _load(device: torch.device) -> Any:
    """DeepSpeed for a device and the process group that is there: quiet, compiling nothing.

    Raises:
        InputError: It was imported for another kind of device.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    found = get_accelerator().device_name()
    if found != device.type:
        raise InputError(
            f"scaling.strategy: DeepSpeed works on {found} here (DS_ACCELERATOR), but the worker's "
            f"device is {device.type}; unset DS_ACCELERATOR, or set scaling.use_gpu to match it"
        )
    logger.setLevel(logging.ERROR)
    # Its shared-memory collectives for CPUs would be compiled at the start of every worker.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(distributed.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


@contextmanager
def _shard_as_built(shard: Callable[[nn.Module], None]) -> Iterator[None]:
    """Shard each submodule when a model under construction takes it up."""

    def take(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        if isinstance(module, FusionModel) and submodule is not None:
            shard(submodule)

    handle = register_module_module_registration_hook(take)
    try:
        yield
    finally:
        handle.remove()


def _unequal(name: str, count: float, others: float) -> InputError:
    return InputError(
        f"the checkpoint's {name!r} was updated {count:.0f} times, but others of its group "
        f"{others:.0f} times; ZeRO keeps one count for them: continue with scaling.strategy=ddp"
    )
