"""A language model on notes and abnormal results: the text branch of MEDFuse (Phan et al. 2024).

Section 3.2 and Table 1's rows of single language models. The paper gives neither adapter, rate,
length nor loss of this stage; what stands here is documented choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import nn

from fusion.encoders.text import TextEncoder, TextOptions
from fusion.encoders.text_base import TINY_LLAMA
from fusion.losses.focal import FocalOptions, focal_terms
from fusion.model import FusionModel, Output, Phase
from fusion.text_branch import ReadsText

if TYPE_CHECKING:
    from data.schema import Batch
    from data.tasks import TaskSpec


class NoteLLM(ReadsText, name="note_llm"):
    """A linear head on the text's vector. A row without any text gets the logits of zeros.

    Submodules: text (model: the backbone with its adapters), head.
    """

    text: TextEncoder
    modalities = ("notes", "labs")
    TINY: ClassVar = {
        "backbone": str(TINY_LLAMA),
        "random_weights": True,
        "adapter": "full",
        "max_length": 96,
    }

    class Config(TextOptions, FocalOptions, FusionModel.Config):
        """Choices; the paper says nothing of them."""

        name: Literal["note_llm"] = "note_llm"
        head_dropout: float = Field(default=0.0, ge=0, lt=1)
        """On the text's vector."""

    def __init__(self, config: Config, task: TaskSpec) -> None:
        super().__init__(config, task)
        self.config = config
        self.task = task
        self.phases = (Phase(terms=(config.term,)),)
        self.text = TextEncoder(config)
        self.dropout = nn.Dropout(config.head_dropout)
        self.head = self._new_head()

    def forward(self, batch: Batch) -> Output:
        """One pass over a batch."""
        vectors = self.text_vectors(batch)
        logits = self.head(self.dropout(vectors)).float()
        return Output(logits, {"text": vectors}, focal_terms(logits, batch, self.config, self.task))

    def _new_head(self) -> nn.Linear:
        """As transformers draws it: N(0, initializer_range), bias 0."""
        base = self.text.base
        head = nn.Linear(self.text.width, len(self.task.labels), bias=base.family.head_bias)
        nn.init.normal_(head.weight, 0.0, base.config.initializer_range)
        if base.family.head_bias:
            nn.init.zeros_(head.bias)
        return head
