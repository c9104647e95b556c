"""Optimizer, schedule, and the learning rate of each parameter."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data.config import Config


class OptimConfig(Config):
    """Adam or AdamW, per-group rates, and the schedule."""

    name: Literal["adam", "adamw"] = "adam"
    lr: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    group_lr: dict[str, float] = Field(default_factory=dict)
    """Learning rate by prefix of parameter names; the longest prefix wins; 0 freezes."""
    clip_norm: float | None = Field(default=None, gt=0)
    schedule: Literal["constant", "plateau", "linear", "cosine"] = "constant"
    """`plateau` halves the rate after `plateau_patience` epochs without a lower val loss: the
    task's, or the one that selects. `linear` and `cosine` (half a period) fall over the updates of
    all epochs to `final` of the rate."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of all updates over which the rate rises from 0, before any schedule."""
    final: float = Field(default=0.0, ge=0, le=1)
    """What `linear` and `cosine` end at, as a share of the rate."""
    plateau_factor: float = Field(default=0.5, gt=0, lt=1)
    plateau_patience: int = Field(default=10, ge=0)


def matches(name: str, prefix: str) -> bool:
    """Whether a dotted name is `prefix`, lies below it, or the prefix is empty."""
    return not prefix or name == prefix or name.startswith(prefix + ".")


def rate(name: str, config: OptimConfig) -> float:
    """The learning rate of a parameter: that of the longest matching prefix."""
    prefixes = [prefix for prefix in config.group_lr if matches(name, prefix)]
    return config.group_lr[max(prefixes, key=len)] if prefixes else config.lr
