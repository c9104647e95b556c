"""How long and how a run trains; when it writes checkpoints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data.config import Config


class TrainConfig(Config):
    """The loop."""

    epochs: int = Field(default=50, ge=1)
    min_epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=16, ge=1)
    """Rows of a global batch, whatever the number of workers."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches a worker's share of a step is cut into."""
    patience: int = Field(default=15, ge=1)
    """Epochs without a better selection metric before stopping."""
    selection_metric: Literal["auroc", "auprc"] = "auroc"
    """Macro mean over labels on the validation split."""
    evaluate: Literal["after_epoch", "before_epoch"] = "after_epoch"
    """`before_epoch`: the released MedFuse loop, whose last epoch is never validated."""
    restore: Literal["best", "last"] = "best"
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    batch_norm: Literal["per_worker", "synchronised"] = "per_worker"
    drop_last: bool = False
    """The released train loader drops the short last batch; here it is used."""


class CheckpointConfig(Config):
    """When checkpoints are written and how many are kept (the best is always kept)."""

    every_steps: int | None = Field(default=None, ge=1)
    """Also within an epoch; at the end of every epoch in any case."""
    num_to_keep: int = Field(default=2, ge=1)
