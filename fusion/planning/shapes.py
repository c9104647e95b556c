"""Language models by their architecture alone: enough to plan with, nothing is downloaded."""

from __future__ import annotations

import difflib
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import nn

from data.config import Config
from data.errors import InputError
from fusion.model import FusionModel, Output

if TYPE_CHECKING:
    from data.schema import Batch
    from data.tasks import TaskSpec


@dataclass(frozen=True)
class Shape:
    """Numbers of a published decoder.

    Attributes:
        hidden: Width.
        layers: Blocks.
        heads: Attention heads of the queries.
        kv_heads: Attention heads of keys and values.
        feedforward: Width of the gated network of each block.
        vocabulary: Rows of the embedding.
        source: Where the numbers are published.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feedforward: int
    vocabulary: int
    source: str


SHAPES: dict[str, Shape] = {
    "llama-3-8b": Shape(
        4096, 32, 32, 8, 14336, 128256, "The Llama 3 Herd of Models (arXiv:2407.21783), table 3"
    ),
    "llama-2-13b": Shape(
        5120, 40, 40, 40, 13824, 32000, "Llama 2 (arXiv:2307.09288); config.json of its release"
    ),
}


class LlamaConfig(Config):
    """A decoder with a classifying head, whole or with low-rank adapters."""

    hidden: int = Field(ge=1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    feedforward: int = Field(ge=1)
    vocabulary: int = Field(ge=2)
    lora_rank: int | None = Field(default=None, ge=1)
    """Train adapters of this rank on every linear layer of the blocks; the rest is frozen."""
    base: Literal["fp32", "bf16"] = "fp32"
    """How the frozen weights are held, with adapters."""

    @classmethod
    def of(cls, shape: Shape, lora_rank: int | None = None, base: str = "bf16") -> LlamaConfig:
        """A published shape: whole, or with adapters on frozen weights."""
        numbers = {name: value for name, value in asdict(shape).items() if name != "source"}
        adapted = {} if lora_rank is None else {"lora_rank": lora_rank, "base": base}
        return cls.model_validate({**numbers, **adapted})


class Llama(FusionModel):
    """transformers' Llama with one linear layer on the last token's state.

    It reads the shape [B, T] of a batch's series as B notes of T tokens.
    """

    modalities = ("ehr",)

    def __init__(self, config: LlamaConfig, task: TaskSpec) -> None:
        super().__init__(config, task)
        from transformers import LlamaConfig as Architecture
        from transformers import LlamaModel

        architecture = Architecture(
            hidden_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            intermediate_size=config.feedforward,
            vocab_size=config.vocabulary,
            use_cache=False,
            attn_implementation="sdpa",
        )
        decoder: Any = LlamaModel(architecture)
        if config.lora_rank is not None:
            from peft import LoraConfig, get_peft_model

            if config.base == "bf16":
                decoder = decoder.to(torch.bfloat16)
            adapters = LoraConfig(
                r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear"
            )
            with warnings.catch_warnings():
                # peft asks a property that transformers has renamed.
                warnings.simplefilter("ignore", FutureWarning)
                decoder = get_peft_model(decoder, adapters)
        self.decoder = decoder
        self.head = nn.Linear(config.hidden, len(task.labels))

    def forward(self, batch: Batch) -> Output:
        """One pass over a batch."""
        tokens = torch.zeros(batch.ehr.shape[:2], dtype=torch.int64, device=batch.ehr.device)
        states = self.decoder(input_ids=tokens).last_hidden_state
        return Output(self.head(states[:, -1].float()).float())


def shape(name: str) -> Shape:
    """The shape of that name.

    Raises:
        InputError: There is none.
    """
    if name not in SHAPES:
        close = difflib.get_close_matches(name.lower(), SHAPES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(SHAPES)}"
        raise InputError(f"--shape: unknown shape {name!r}; {hint}")
    return SHAPES[name]


def parameters(shape: Shape) -> int:
    """Parameters of the decoder without a language model's head, counted by hand."""
    kv = shape.hidden * shape.kv_heads // shape.heads
    attention = 2 * shape.hidden**2 + 2 * shape.hidden * kv
    block = attention + 3 * shape.hidden * shape.feedforward + 2 * shape.hidden
    return shape.vocabulary * shape.hidden + shape.layers * block + shape.hidden
