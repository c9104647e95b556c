"""Adapters of peft on a frozen backbone: LoRA, rank-stabilised LoRA, DoRA, QLoRA."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import nn

from data.errors import InputError
from fusion import placement

if TYPE_CHECKING:
    from collections.abc import Sequence

Adapter = Literal["none", "lora", "rslora", "dora", "qlora", "full"]
NAME: Final = "default"
_OF_ADAPTERS: Final = ("lora_A", "lora_B", "lora_magnitude_vector")


def lora_config(
    kind: Adapter,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: str | Sequence[str],
    **more: Any,
) -> Any:
    """Peft's LoraConfig of an adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
        bias="none",
        **more,
    )


def add_adapter(backbone: nn.Module, kind: Adapter, config: Any) -> None:
    """Put adapters into a backbone; they alone are trainable then, in float32.

    Args:
        backbone: Frozen.
        kind: `none` leaves it frozen, `full` makes all of it trainable.
        config: Of `lora_config`; unused by those two.

    Raises:
        InputError: The backbone has no such modules, or the machine cannot do it.
    """
    if kind in ("none", "full"):
        backbone.requires_grad_(kind == "full")
        return
    if kind == "dora" and placement.current().shards:
        raise InputError(
            "model.adapter=dora reads whole weights, which scaling.strategy=zero3 shards; choose "
            "zero2, or model.adapter=lora"
        )
    from peft import inject_adapter_in_model

    try:
        inject_adapter_in_model(config, backbone, NAME)
    except ValueError:
        names = sorted({n.split(".")[-1] for n, m in backbone.named_modules() if _linear(m)})
        raise InputError(
            f"model.target_modules: the backbone has no modules named {config.target_modules}; it "
            f"has {', '.join(names)}, or set all-linear"
        ) from None
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's."""
    return any(part in _OF_ADAPTERS for part in name.split("."))


def adapted_modules(names: Sequence[str]) -> list[str]:
    """Dotted names of the modules that have adapters, from the names of all parameters."""
    found = {name.split(".lora_A.")[0] for name in names if ".lora_A." in name}
    return sorted(found)


def refuse_qlora() -> None:
    """Refuse QLoRA on a machine that lacks what it needs.

    Raises:
        InputError: Says what is lacking.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "model.adapter=qlora needs the package bitsandbytes, which is not installed; install "
            "it, or set model.adapter=lora"
        )
    if not torch.cuda.is_available():
        raise InputError(
            "model.adapter=qlora needs a CUDA device, and there is none; set model.adapter=lora"
        )


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
