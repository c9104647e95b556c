"""Where a run stands, and when it stops: what a checkpoint remembers beside the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion.training.config import TrainConfig


@dataclass
class Progress:
    """The position in the plan, and what selection has seen.

    Attributes:
        epoch: Of the next step, from 0.
        step: Next step within its epoch.
        updates: Steps taken since the run began.
        best_score: Best selection metric so far.
        best_epoch: Epochs trained when it was reached.
        epochs_since_best: Validations since then without a better one.
        validations: Validations so far.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    best_score: float | None = None
    best_epoch: int | None = None
    epochs_since_best: int = 0
    validations: int = 0

    def record(self, score: float, *, lowest: bool = False) -> bool:
        """Take note of a validation; True where it is the best so far."""
        self.validations += 1
        best = self.best_score
        if best is None or (score < best if lowest else score > best):
            self.best_score, self.best_epoch, self.epochs_since_best = score, self.epoch, 0
            return True
        self.epochs_since_best += 1
        return False

    def exhausted(self, config: TrainConfig) -> bool:
        """Whether patience has run out."""
        return self.epoch >= config.min_epochs and self.epochs_since_best >= config.patience

    def finished(self, config: TrainConfig) -> bool:
        """Whether nothing is left to train."""
        return self.epoch >= config.trained_epochs or self.exhausted(config)

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)
