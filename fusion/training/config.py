"""How long and how a run trains; when it writes checkpoints."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from data.config import Config

StrategyName = Literal["single", "ddp", "zero1", "zero2", "zero3"]
Offload = Literal["none", "optimizer", "all"]
SCORES = ("auroc", "auprc", "f1")
"""Selection metrics of every model; the highest is best."""


class TrainConfig(Config):
    """The loop."""

    epochs: int = Field(default=50, ge=1)
    min_epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=16, ge=1)
    """Rows of a global batch, whatever the number of workers."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches a worker's share of a step is cut into."""
    tokens_per_pass: int | None = Field(default=16384, ge=1)
    """For models that read text: most tokens, padding counted, of a micro-batch. Each worker sorts
    its rows of a step by length and cuts them so, instead of into `accumulation` parts; the step is
    the same. A text longer than that has a pass of its own. Smaller ones pad less, larger ones keep
    a GPU busy: 4096 is the faster on a CPU. null cuts by `accumulation`."""
    patience: int = Field(default=15, ge=1)
    """Epochs without a better selection metric before stopping."""
    selection_metric: str = "auroc"
    """On the validation split: `auroc`, `auprc` or `f1` (at a probability of 0.5), macro means over
    labels; or a loss that the
    model counts by values (mltm: `masked`, `seen`), of which the lowest is best."""
    evaluate: Literal["after_epoch", "before_epoch"] = "after_epoch"
    """`before_epoch`: the released MedFuse loop. It validates before each epoch and counts them
    from 1, so that `epochs` 50 trains 49, and the last one is never validated."""
    restore: Literal["best", "last"] = "best"
    """Which weights the run ends with, in best/."""
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    cache_embeddings: bool = False
    """Keep the outputs of a frozen image encoder (`optim.group_lr.cxr_encoder` 0) beside the row
    cache, for all runs and trials with the same encoder, shards, split, preset and transforms;
    wants images that are neither augmented nor cropped at random."""
    recompute: bool = False
    """Activation checkpointing: keep the inputs of encoder blocks only, and run the blocks again in
    the backward pass. Less memory for about a third more computation."""
    batch_norm: Literal["per_worker", "synchronised"] = "per_worker"
    """`per_worker`: each worker normalises by its own rows, and worker 0's running statistics are
    those that are evaluated. `synchronised`: by the rows of all workers."""
    drop_last: bool = False
    """The released train loader drops the short last batch; here it is used."""
    log_every_steps: int = Field(default=20, ge=1)
    """Steps whose means make one line of the metrics."""
    profile: str | None = None
    """First and last step, counted from 0 over the run, of which worker 0 writes a trace for
    chrome://tracing into the run's traces/, e.g. "10-15". It ends with its epoch."""

    @model_validator(mode="after")
    def _trains(self) -> TrainConfig:
        if self.evaluate == "before_epoch" and self.epochs < 2:
            raise ValueError("evaluate=before_epoch trains epochs - 1 epochs: set epochs >= 2")
        return self

    @field_validator("profile", mode="after")
    @classmethod
    def _steps(cls, value: str | None) -> str | None:
        found = re.fullmatch(r"(\d+)-(\d+)", value) if value is not None else None
        if value is not None and (found is None or int(found[1]) > int(found[2])):
            raise ValueError('needs the first and the last step, e.g. "10-15"')
        return value

    @property
    def lowest_is_best(self) -> bool:
        """Whether the selection metric is a loss."""
        return self.selection_metric not in SCORES

    @property
    def profiled(self) -> tuple[int, int] | None:
        """First and last step that are traced."""
        if self.profile is None:
            return None
        first, last = self.profile.split("-")
        return int(first), int(last)

    @property
    def trained_epochs(self) -> int:
        """Epochs that update weights, if nothing stops them early."""
        return self.epochs - (self.evaluate == "before_epoch")


class CheckpointConfig(Config):
    """When checkpoints are written and how many are kept (the best is always kept)."""

    every_steps: int | None = Field(default=None, ge=1)
    """Also within an epoch; at the end of every epoch in any case."""
    every_minutes: float | None = Field(default=None, gt=0)
    """Also when the last one is that old, by worker 0's clock, after the step in hand."""
    num_to_keep: int = Field(default=2, ge=1)
    asynchronous: bool = True
    """Training waits only for a copy in host memory; a thread writes it. False: until written."""
