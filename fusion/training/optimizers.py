"""From a model and its OptimConfig to optimizers, one a phase, and their schedules."""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from data.errors import InputError
from fusion.training.optim import matches, rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from fusion.model import FusionModel, Phase
    from fusion.training.optim import OptimConfig


def freeze(model: FusionModel, config: OptimConfig) -> None:
    """Take the parameters whose rate is 0, or that no phase updates, out of training.

    Raises:
        InputError: A prefix of `group_lr` matches no parameter, its rate is negative, or a phase
            has no trainable parameter left.
    """
    names = [name for name, _ in model.named_parameters()]
    for prefix, lr in config.group_lr.items():
        if not any(matches(name, prefix) for name in names):
            known = sorted({part for name in names for part in _prefixes(name)})
            close = difflib.get_close_matches(prefix, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(_tops(names))}"
            raise InputError(f"optim.group_lr: the model has no parameter under {prefix!r}; {hint}")
        if lr < 0:
            raise InputError(f"optim.group_lr.{prefix}: a rate cannot be negative (got {lr})")
    for name, parameter in model.named_parameters():
        if rate(name, config) == 0 or not any(_updates(phase, name) for phase in model.phases):
            parameter.requires_grad_(False)
    for phase in model.phases:
        if not phase_parameters(model, phase):
            raise InputError(
                f"phase {phase.name!r} has no trainable parameter: optim.group_lr freezes them "
                "all; give one of its prefixes a rate above 0"
            )


def train_mode(model: nn.Module) -> None:
    """Training mode, but evaluation mode for modules whose every parameter is frozen.

    A frozen encoder then has neither dropout nor moving batch-norm statistics.
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def build_optimizers(
    model: nn.Module, phases: Sequence[Phase], config: OptimConfig
) -> list[Optimizer]:
    """One optimizer a phase, over the trainable parameters that the phase updates."""
    return [_build(model, phase, config) for phase in phases]


def phase_parameters(model: nn.Module, phase: Phase) -> dict[str, nn.Parameter]:
    """The trainable parameters a phase updates, by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and _updates(phase, name)
    }


class PhasedAdam(torch.optim.Adam):
    """The optimizers of all phases in one: each has its own state, and steps its own groups only.

    For wrappers that take one optimizer and put their own tensors in its groups' place. A group
    holds the parameters of one rate that the same phases update; its `phases` are their numbers.

    Attributes:
        phase: Number of the phase that `step` updates.
        states: Of each phase, as `state`.
    """

    def __init__(self, groups: list[dict[str, Any]], phases: int, **options: Any) -> None:
        super().__init__(groups, **options)
        self.phase = 0
        self.states: list[defaultdict[Tensor, dict[str, Any]]] = [
            defaultdict(dict) for _ in range(phases)
        ]
        self.state = self.states[0]

    def step(self, closure: Any = None) -> Any:
        """One update of the groups of the current phase."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if self.phase in group["phases"]]
        self.state = self.states[self.phase]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


def build_phased_optimizer(
    model: nn.Module, phases: Sequence[Phase], config: OptimConfig
) -> PhasedAdam:
    """What `build_optimizers` gives, as one optimizer."""
    groups: dict[tuple[float, tuple[int, ...]], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        numbers = tuple(n for n, phase in enumerate(phases) if _updates(phase, name))
        if parameter.requires_grad and numbers:
            groups.setdefault((rate(name, config), numbers), []).append(parameter)
    return PhasedAdam(
        [
            {"params": members, "lr": lr, "initial_lr": lr, "phases": numbers}
            for (lr, numbers), members in groups.items()
        ],
        len(phases),
        betas=config.betas,
        weight_decay=config.weight_decay,
        decoupled_weight_decay=config.name == "adamw",
    )


class Schedule:
    """A factor on every group's initial rate: the same in all optimizers and strategies."""

    def __init__(self, config: OptimConfig, updates: int) -> None:
        """Start at the first of a run's `updates`."""
        self._config = config
        self._warm = round(config.warmup * updates)
        self._updates = updates
        # torch's schedulers move the rate of an optimizer: here that of a stand-in, from 1.
        self._unit = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        self._plateau: ReduceLROnPlateau | None = None
        if config.schedule == "plateau":
            self._plateau = ReduceLROnPlateau(
                self._unit, factor=config.plateau_factor, patience=config.plateau_patience
            )

    def step(self, loss: float) -> None:
        """Take note of a validation loss."""
        if self._plateau is not None:
            self._plateau.step(loss)

    def factor(self, update: int) -> float:
        """Of update 0, 1, ...: the share of its rate that each group has."""
        plateau = float(self._unit.param_groups[0]["lr"])
        if update < self._warm:
            return plateau * (update + 1) / self._warm
        place = min(1.0, (update - self._warm) / max(1, self._updates - self._warm))
        fallen = {"linear": place, "cosine": (1 - math.cos(math.pi * place)) / 2}
        return plateau * (1 - (1 - self._config.final) * fallen.get(self._config.schedule, 0.0))

    def apply(self, optimizers: Sequence[Optimizer], update: int) -> None:
        """Set every group's rate for an update."""
        factor = self.factor(update)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        return {} if self._plateau is None else dict(self._plateau.state_dict())

    def load(self, state: dict[str, Any]) -> None:
        """Continue where `dump` was."""
        if self._plateau is not None:
            self._plateau.load_state_dict(state)
            self._unit.param_groups[0]["lr"] = self._plateau.get_last_lr()[0]


def _build(model: nn.Module, phase: Phase, config: OptimConfig) -> Optimizer:
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in phase_parameters(model, phase).items():
        groups.setdefault(rate(name, config), []).append(parameter)
    kind: Any = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    optimizer: Optimizer = kind(
        [{"params": members, "lr": lr, "initial_lr": lr} for lr, members in groups.items()],
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    return optimizer


def _updates(phase: Phase, name: str) -> bool:
    return any(matches(name, prefix) for prefix in phase.parameters or ("",))


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _tops(names: list[str]) -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] for name in names))
