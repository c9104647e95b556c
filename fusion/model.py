"""The contract of a model. Read this first.

A model knows one device and one batch. It gets a `Batch`, gives an `Output`, and names its
auxiliary losses; the loop (fusion/training/loop.py) weighs, sums, distributes and logs them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from data.config import Config
from fusion import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from data.schema import Batch
    from data.tasks import TaskSpec


@dataclass(frozen=True)
class Term:
    """A loss as a sum over rows, never a mean.

    The loop divides by the number of rows, over all ranks and micro-batches of the step, that have
    every modality in `over`, so that a mean over paired rows is the same on 1 and on 3 workers. A
    term among the model's `counted` is a sum over values, and divided by their number.

    Attributes:
        sum: Scalar: the sum over those rows (of a mean over classes or features within a row).
        over: The modalities a row needs to be counted; () counts every row.
        scale: The coefficient (a model's lambda) by which the mean enters the loss. The log
            shows the unscaled mean.
    """

    sum: Tensor
    over: tuple[str, ...] = ()
    scale: float = 1.0


@dataclass(frozen=True)
class Output:
    """What a forward pass gives.

    Attributes:
        logits: [B, C] float32.
        features: Named representations and attention maps for reports, [B, ...] each.
        terms: Named auxiliary losses; the task's own loss is not among them.
    """

    logits: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, Term] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """One of the updates that make up a step, with its own forward pass and its own optimizer.

    Attributes:
        name: Its name in logs and checkpoints.
        parameters: Prefixes of parameter names it updates; () is all of them.
        terms: Names of the terms it minimises; "task" is the task's loss; () is all of them.
        repeats: Updates per step.
        rising: Terms whose weight rises in a line from 0 -> epochs it takes; 0 is at once.
        shares: What a step takes of terms' weights, where it is not all; see `at`.
    """

    name: str = "all"
    parameters: tuple[str, ...] = ()
    terms: tuple[str, ...] = ()
    repeats: int = 1
    rising: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)

    def at(self, epochs: float) -> Phase:
        """This phase in the step that ends so many epochs, and parts of one, after the first."""
        rising = {name: epochs / takes for name, takes in self.rising.items() if epochs < takes}
        return replace(self, shares=rising)


@dataclass(frozen=True)
class Reference:
    """Frozen weights that a model's constructor reads from elsewhere, and no checkpoint holds.

    Attributes:
        source: Where from, in words.
        names: Of parameters and buffers.
        digest: Gives the SHA-256 of the source's content, wherever it lies; it may read all of it.
        setting: Path in a run's config that names the source.
    """

    source: str
    names: frozenset[str]
    digest: Callable[[], str]
    setting: str = "model.backbone"


class FusionModel(nn.Module, ABC):
    """Base of every model; `class X(FusionModel, name="x")` in fusion/models/x.py registers it."""

    name: ClassVar[str]
    modalities: ClassVar[tuple[str, ...]]
    """What it reads of a batch."""
    phases: tuple[Phase, ...] = (Phase(),)
    pretrained: ClassVar[tuple[str, ...]] = ()
    """Submodules that are frozen as they come: a run must name them in `init_from`."""
    image_encoder: ClassVar[str | None] = None
    """Submodule by whose forward pass alone it sees images, so that outputs [P, ...] of that pass
    may come in their place."""
    counted: ClassVar[tuple[str, ...]] = ()
    """Terms that are means over values (`counts` says how many), not over rows. Validation tells
    them, and `train.selection_metric` may name one: the lowest is best."""
    TINY: ClassVar[Mapping[str, Any]] = {}
    """Overrides of its Config that build in milliseconds, for tests."""

    class Config(Config):
        """The paper's numbers, documented; `name` selects the model."""

        name: str

    @classmethod
    def tiny(cls) -> Config:
        """Its smallest sensible Config: what the contract suite builds."""
        return cls.Config(name=cls.name, **cls.TINY)

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name = name
            registry.register(name, cls)

    @abstractmethod
    def __init__(self, config: Any, task: TaskSpec) -> None:
        """Build from its own Config for a task's labels.

        A submodule is complete, its initial values set, before it is assigned to the model: a
        sharding strategy takes its parameters apart from then on.
        """
        super().__init__()

    def references(self) -> dict[str, Reference]:
        """Frozen weights that the constructor read, by the prefix they lie below."""
        return {}

    def passes(self, batch: Batch, tokens: int) -> list[list[int]] | None:
        """Rows of a batch in groups, each of which one pass holds within `tokens` tokens.

        None leaves the cutting to `train.accumulation`.
        """
        return None

    def counts(self, batch: Batch) -> Tensor:
        """[len(counted)] float64 on the CPU: the values of each counted term, before any pass."""
        return torch.zeros(len(self.counted), dtype=torch.float64)

    def tally(self) -> dict[str, float]:
        """Counts of what was read in training since it was last asked, for the log."""
        return {}

    @abstractmethod
    def forward(self, batch: Batch) -> Output:
        """One pass over a batch. Rows without a modality must not change with its content."""
