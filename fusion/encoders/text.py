"""The text encoder: a pretrained language model, adapted, from token ids to one vector a text.

Phan et al. (2024), section 3.2: the final layer's hidden vector of the last token of a causal
model; for BERT the CLS token through the model's own pooler.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from data.config import Config
from data.errors import InputError
from fusion import placement
from fusion.encoders import text_layout
from fusion.encoders.text_adapters import (
    Adapter,
    add_adapter,
    is_adapter,
    lora_config,
    refuse_qlora,
)
from fusion.encoders.text_base import (
    RandomWeights,
    WeightFiles,
    find_base,
    load_backbone,
    load_quantised,
    refuse_long,
)
from fusion.encoders.text_tokens import TextSource, Tokenizer, Tokens, pairs_of
from fusion.layers.present import STAND_INS, PresentRows
from fusion.model import Reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from data.schema import Batch


class TextOptions(Config):
    """A language model and how it is adapted; the paper gives none of these numbers."""

    text: TextSource = "notes_and_labs"
    """What is read: both, or one of them (the paper's ablations)."""
    backbone: str = "ruslanmv/Medical-Llama3-8B"
    """Folder of a model in transformers' format, or its name on the hub: Llama, Mistral or BERT.
    The default is the paper's best."""
    revision: str | None = None
    """Branch, tag or commit of a model of the hub."""
    offline: bool = True
    """Take a model of the hub from its local cache, never from the network."""
    random_weights: bool = False
    """Draw the backbone's weights instead of reading them: for benchmarks and tests."""
    max_length: int = Field(default=2048, ge=8)
    """Most tokens of a text. Results keep their place, the note keeps its head."""
    pad_token: str | None = None
    """A token of the vocabulary that fills rows; null takes the tokenizer's own, or else its
    end-of-text token. It is masked, and texts are pooled by their length, never by this token."""
    adapter: Adapter = "lora"
    """`lora`, `rslora`, `dora` train low-rank adapters on a frozen backbone, `qlora` on one in 4
    bits (CUDA and bitsandbytes); `none` trains the head alone, `full` everything."""
    rank: int = Field(default=16, ge=1)
    """Of an adapter."""
    alpha: float = Field(default=32.0, gt=0)
    """An adapter's output is scaled by alpha / rank, by alpha / sqrt(rank) under rslora."""
    adapter_dropout: float = Field(default=0.05, ge=0, lt=1)
    """On an adapter's input."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers that get adapters, by the ends of their names, e.g. [q_proj, v_proj]."""
    base_precision: Literal["bf16", "fp32"] = "bf16"
    """Of frozen weights; trained ones are float32. With bf16 the backbone computes in bf16."""
    layout: Literal["padded", "packed"] = "padded"
    """Texts of a pass as rows padded to the longest, or packed into one row without padding, each
    attending to itself."""

    @field_validator("backbone", mode="after")
    @classmethod
    def _absolute(cls, value: str) -> str:
        """Workers run in folders of their own."""
        folder = Path(value).expanduser()
        return str(folder.absolute()) if folder.is_dir() else value

    @field_validator("target_modules", mode="after")
    @classmethod
    def _some(cls, value: Any) -> Any:
        if not value:
            raise ValueError("names no layer: name some, or set all-linear")
        return value


class TextEncoder(nn.Module):
    """[N] texts to [N, D] vectors.

    Attributes:
        model: The backbone, without a head.
        base: Where its weights came from.
        tokenizer: From texts to ids.
        width: D.
    """

    def __init__(self, options: TextOptions) -> None:
        """Find, read and adapt the backbone.

        Raises:
            InputError: See `find_base`, `Tokenizer`, `load_backbone` and `add_adapter`.
        """
        super().__init__()
        self.options = options
        self.base = find_base(options.backbone, revision=options.revision, offline=options.offline)
        refuse_long(self.base, options.max_length)
        self.tokenizer = Tokenizer(self.base, options.max_length, options.pad_token)
        self.width: int = self.base.config.hidden_size
        self._pools_first = self.base.family.pooling == "first"
        self._packs = options.layout == "packed"
        self._low = options.base_precision == "bf16" and options.adapter != "full"
        backbone = _backbone(self, options)
        add_adapter(backbone, options.adapter, self.adapter_config())
        self.model = backbone

    def adapter_config(self, **more: Any) -> Any:
        """Peft's configuration of the adapters, with what a saved one adds."""
        options = self.options
        return lora_config(
            options.adapter,
            rank=options.rank,
            alpha=options.alpha,
            dropout=options.adapter_dropout,
            **{"target_modules": options.target_modules, **more},
        )

    def frozen_names(self) -> frozenset[str]:
        """Names in this module's state that are as the base's files have them."""
        trained = {name for name, value in self.named_parameters() if value.requires_grad}
        own = {name for name in self.state_dict() if is_adapter(name)}
        return frozenset(self.state_dict().keys() - trained - own)

    def tokens(self, note: str, labs: str) -> Tokens:
        """The tokens of a row's note and sentence of results."""
        return self.tokenizer.encode(note, labs)

    def read(self, batch: Batch) -> list[Tokens | None]:
        """[B] the tokens of each row's note and results; None where it has no text."""
        pairs = pairs_of(batch, self.options.text)
        texts = [self.tokens(*pair) if any(pair) else None for pair in pairs]
        return [None if text is None or text.empty else text for text in texts]

    def rows(self, texts: Sequence[Tokens | None], device: torch.device) -> tuple[Tensor, Tensor]:
        """[B, D] vectors of rows' texts, and [B] bool: which rows have one; zeros without."""
        index = [row for row, text in enumerate(texts) if text is not None]
        rows = PresentRows(
            values=torch.empty(0),
            index=torch.tensor(index, dtype=torch.int64, device=device),
            available=torch.tensor([text is not None for text in texts], device=device),
            stands_in=not index,
        )
        some = [text for text in texts if text is not None]
        vectors = rows.scatter(self(some or [self.tokens("", "")] * STAND_INS))
        return vectors, rows.available

    def references(self, prefix: str) -> dict[str, Reference]:
        """The frozen backbone under the name that a model gives this module, unless it is drawn."""
        if self.options.random_weights:
            return {}
        base = self.base
        source = base.name if base.revision is None else f"{base.name}@{base.revision}"
        names = frozenset(f"{prefix}.{name}" for name in self.frozen_names())
        return {prefix: Reference(source, names, base.sha256)}

    def passes(self, batch: Batch, tokens: int) -> list[list[int]]:
        """Rows whose texts one pass of `tokens` tokens holds; a row without one counts as one."""
        lengths = [1 if text is None else text.length for text in self.read(batch)]
        return self.groups(lengths, tokens)

    def groups(self, lengths: Sequence[int], budget: int) -> list[list[int]]:
        """Texts in passes of up to `budget` tokens in this layout, padding counted."""
        group = text_layout.group_packed if self._packs else text_layout.group_padded
        return group(lengths, budget)

    def area(self, lengths: Sequence[int]) -> int:
        """Tokens of a pass over texts of these lengths, padding counted."""
        return sum(lengths) if self._packs else len(lengths) * max(lengths)

    def forward(self, texts: Sequence[Tokens]) -> Tensor:
        """N >= 1 texts to [N, D] float32."""
        ids = [text.ids for text in texts]
        device = next(self.model.parameters()).device
        low = torch.autocast(device.type, dtype=torch.bfloat16) if self._low else nullcontext()
        with low:
            if self._packs:
                states, borders = text_layout.packed(self.model, ids)
                ends = [end - 1 for end in borders[1:]]
                pooled = states[0, torch.tensor(borders[:-1] if self._pools_first else ends)]
            else:
                states, valid = text_layout.padded(self.model, ids, self.tokenizer.pad_id)
                rows = torch.arange(len(ids), device=device)
                last = valid.sum(1) - 1
                pooled = states[rows, torch.zeros_like(last) if self._pools_first else last]
            if self._pools_first:
                pooled = self.model.get_submodule("pooler")(pooled[:, None])
        return pooled.float()


def _backbone(encoder: TextEncoder, options: TextOptions) -> nn.Module:
    base = encoder.base
    attention = "sdpa"
    if options.layout == "packed":
        text_layout.register_packed_attention()
        attention = text_layout.PACKED_ATTENTION
    if options.adapter == "qlora":
        refuse_qlora()
        if options.random_weights or placement.current().shards:
            raise InputError(
                "model.adapter=qlora reads a base whole: set model.random_weights=false, and "
                "scaling.strategy to ddp or zero2"
            )
        return load_quantised(base, attention)
    source = (
        RandomWeights(base.config.initializer_range)
        if options.random_weights
        else WeightFiles(base)
    )
    low = options.base_precision == "bf16" and options.adapter != "full"
    return load_backbone(base, source, torch.bfloat16 if low else torch.float32, attention)
