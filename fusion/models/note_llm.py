"""A language model on notes and abnormal results: the text branch of MEDFuse (Phan et al. 2024).

Section 3.2 and Table 1's rows of single language models. The paper gives neither adapter, rate,
length nor loss of this stage; what stands here is documented choice.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from fusion.encoders.text import TextEncoder, TextOptions
from fusion.encoders.text_tokens import Tally
from fusion.layers.present import STAND_INS, PresentRows
from fusion.losses.focal import focal_by_class
from fusion.losses.rows import term
from fusion.model import FusionModel, Output, Phase, Reference

if TYPE_CHECKING:
    from data.schema import Batch
    from data.tasks import TaskSpec
    from fusion.encoders.text_tokens import Tokens

TINY_LLAMA = Path(__file__).parents[1] / "encoders" / "tiny_llama"


class NoteLLM(FusionModel, name="note_llm"):
    """A linear head on the text's vector. A row without any text gets the logits of zeros.

    Submodules: text (model: the backbone with its adapters), head.
    """

    modalities = ("notes", "labs")
    TINY: ClassVar = {
        "backbone": str(TINY_LLAMA),
        "random_weights": True,
        "adapter": "full",
        "max_length": 96,
    }

    class Config(TextOptions, FusionModel.Config):
        """Choices; the paper says nothing of them."""

        name: Literal["note_llm"] = "note_llm"
        text: Literal["notes_and_labs", "notes", "labs"] = "notes_and_labs"
        """What is read: both, or one of them (the paper's ablations)."""
        head_dropout: float = Field(default=0.0, ge=0, lt=1)
        """On the text's vector."""
        loss: Literal["focal", "bce"] = "focal"
        """What is minimised; the validation loss is binary cross-entropy in any case."""
        focal_gamma: float = Field(default=2.0, ge=0)
        """0 is binary cross-entropy."""
        focal_alpha: float | None = Field(default=None, gt=0, lt=1)
        """Weight of the positives; null weighs both by 1."""

    def __init__(self, config: Config, task: TaskSpec) -> None:
        super().__init__(config, task)
        self.config = config
        self.labels = task.labels
        if config.loss == "focal":
            self.phases = (Phase(terms=("focal",)),)
        self.text = TextEncoder(config)
        self.dropout = nn.Dropout(config.head_dropout)
        self.head = self._new_head()
        self._tally = Tally()

    def forward(self, batch: Batch) -> Output:
        """One pass over a batch."""
        texts = self._texts(batch)
        if self.training and len(batch.rows):
            for text in texts:
                self._tally.add(text)
        device = batch.targets.device
        index = [row for row, text in enumerate(texts) if text is not None]
        rows = PresentRows(
            values=torch.empty(0),
            index=torch.tensor(index, dtype=torch.int64, device=device),
            available=torch.tensor([text is not None for text in texts], device=device),
            stands_in=not index,
        )
        read = [texts[row] for row in index] or [self.text.tokens("", "")] * STAND_INS
        vectors = rows.scatter(self.text(read))
        logits = self.head(self.dropout(vectors)).float()
        terms = {}
        if self.config.loss == "focal":
            by_class = focal_by_class(
                logits, batch.targets, self.config.focal_gamma, self.config.focal_alpha
            )
            terms["focal"] = term(by_class.mean(1), batch, ())
        return Output(logits, {"text": vectors}, terms)

    def references(self) -> dict[str, Reference]:
        """The frozen backbone, unless its weights were drawn."""
        if self.config.random_weights:
            return {}
        base = self.text.base
        source = base.name if base.revision is None else f"{base.name}@{base.revision}"
        full = frozenset(f"text.{name}" for name in self.text.frozen_names())
        return {"text": Reference(source, full, base.sha256)}

    def passes(self, batch: Batch, tokens: int) -> list[list[int]]:
        """Rows whose texts a pass holds; a row without a text counts as one token."""
        lengths = [1 if text is None else len(text.ids) for text in self._texts(batch)]
        return self.text.groups(lengths, tokens)

    def tally(self) -> dict[str, float]:
        """Texts read, and what the limit of their length cut."""
        return {f"text_{name}": float(count) for name, count in self._tally.take().items()}

    def _texts(self, batch: Batch) -> list[Tokens | None]:
        """[B] a row's tokens; None where it has no text."""
        notes, labs = [""] * len(batch), [""] * len(batch)
        if self.config.text != "labs":
            for row, note in zip(batch.notes_index.tolist(), batch.notes, strict=True):
                notes[row] = note
        if self.config.text != "notes" and batch.lab_texts:
            labs = list(batch.lab_texts)
        pairs = zip(notes, labs, strict=True)
        tokens = [self.text.tokens(*pair) if any(pair) else None for pair in pairs]
        return [None if text is None or text.empty else text for text in tokens]

    def _new_head(self) -> nn.Linear:
        """As transformers draws it: N(0, initializer_range), bias 0."""
        base = self.text.base
        head = nn.Linear(self.text.width, len(self.labels), bias=base.family.head_bias)
        nn.init.normal_(head.weight, 0.0, base.config.initializer_range)
        if base.family.head_bias:
            nn.init.zeros_(head.bias)
        return head
