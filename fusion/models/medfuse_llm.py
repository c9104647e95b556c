"""MEDFuse (Phan et al., CIKM 2024): a language model on notes, masked lab-test modelling, fusion.

No code was released, and beside lambda = 0.1 and the 75 % of the lab branch the paper gives no
number: what stands here is documented choice. Its MI loss adds the critic's log-likelihood to the
bound and minimises both, which makes the critic worse; `mi_update` says what is done instead.
"""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  pydantic reads the Config's types
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional as F

from fusion.encoders.kept_text import KeptText
from fusion.encoders.labs import LabEncoder, LabOptions
from fusion.encoders.text import TextEncoder, TextOptions
from fusion.encoders.text_base import TINY_LLAMA
from fusion.layers.dense_fusion import ConcatPerceptron, DenseFusion
from fusion.layers.disentangled import DisentangledTransformer
from fusion.layers.present import StandIn, present_labs
from fusion.losses.focal import FocalOptions, focal_terms
from fusion.losses.rows import term
from fusion.losses.vclub import ConditionalGaussian, log_likelihood, vclub_by_row
from fusion.model import FusionModel, Output, Phase, Term
from fusion.text_branch import ReadsText

if TYPE_CHECKING:
    from torch import Tensor

    from data.schema import Batch
    from data.tasks import TaskSpec


SIZES = {"tokens", "token_width", "width", "heads", "layers", "dropout", "append_one"}


class MedFuseLLM(ReadsText, name="medfuse_llm"):
    """Text vector A, lab vector B; what is specific to each and what they share; a dense head.

    Loss: the focal loss + lambda vCLUB(concat(s_a, s_b); s_c). The terms `vclub` and `nll` (the
    critic's negative log-likelihood) see s_c under a LayerNorm without weights: by a smaller scale
    alone the bound could be had for nothing. vCLUB may be negative while the critic is poor; it is
    a mean over the rows that one pass of all workers holds, so it alone depends on micro-batches.

    A row without text has zeros for A, whose LayerNorm makes its learned bias of them. A row
    without results, which the cohort has none of, has a learned vector for B.

    Submodules: text, labs, no_labs, fusion, head, critic; `concat` has neither fusion nor critic.
    Features: `text` A, `labs` B, and with disentangled fusion `text_specific` s_a, `labs_specific`
    s_b, `shared` s_c.
    """

    modalities = ("notes", "labs")
    TINY: ClassVar = {
        "backbone": str(TINY_LLAMA),
        "random_weights": True,
        "adapter": "full",
        "max_length": 96,
        "labs": {"dim": 8, "heads": 2, "encoder_depth": 2},
        "items": 6,
        "tokens": 4,
        "token_width": 4,
        "width": 8,
        "heads": 2,
        "critic_hidden": 8,
    }

    class Config(TextOptions, FocalOptions, FusionModel.Config):
        """The paper's lambda; everything else is choice."""

        name: Literal["medfuse_llm"] = "medfuse_llm"
        embeddings: Path | None = None
        """Folder of texts' vectors that `rayfuse data embed` keeps, read in place of running the
        language model, which is not even loaded; the options of the text are then those of the run
        they come from. null runs the language model."""
        labs: LabOptions = LabOptions()
        """The lab encoder; as in the run of `mltm` that its weights come from."""
        items: int = Field(default=100, ge=1)
        """Columns of the lab matrix (K); at least `data.batches.labs.top`."""
        use_labs: bool = True
        """False: no lab encoder; every row has the learned vector of rows without results."""
        fusion: Literal["disentangled", "concat"] = "disentangled"
        """`concat`: a network on both vectors (ablation, Table 3), without an MI loss."""
        tokens: int = Field(default=16, ge=1)
        """Tokens that each vector becomes (m)."""
        token_width: int = Field(default=64, ge=1)
        """Of a token before and in the outer product."""
        width: int = Field(default=256, ge=1)
        """Of everything after it (d)."""
        heads: int = Field(default=8, ge=1)
        """Attention heads; they divide `width`."""
        layers: int = Field(default=1, ge=1)
        """Of the disentangled transformer."""
        dropout: float = Field(default=0.1, ge=0, lt=1)
        """In the fusion and in the head."""
        append_one: bool = False
        """Keep each token itself beside the outer product."""
        mi_weight: float = Field(default=0.1, ge=0, le=1)
        """Lambda; at 0 no pass asks the critic, and no phase trains it."""
        mi_warmup: float = Field(default=1.0, ge=0)
        """Epochs in which lambda rises from 0, while the critic learns what it is asked."""
        mi_update: Literal["alternating", "joint", "printed"] = "alternating"
        """`alternating`: the critic has its own updates before the network's, each with a pass of
        its own. `joint`: both in one pass, each minimising its own. `printed`: one sum of all, as
        the text has it, which makes the critic worse and has no lower bound."""
        critic_updates: int = Field(default=1, ge=1, le=5)
        """Of the critic for each of the network (`alternating`)."""
        critic_hidden: int = Field(default=256, ge=1)
        """Width of the critic's hidden layers."""

        @model_validator(mode="after")
        def _divided(self) -> MedFuseLLM.Config:
            if self.width % self.heads:
                raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
            return self

        @property
        def weighs_information(self) -> bool:
            """Whether there is an MI loss."""
            return self.fusion == "disentangled" and self.mi_weight > 0

    def __init__(self, config: Config, task: TaskSpec) -> None:
        super().__init__(config, task)
        self.config = config
        self.task = task
        classes = len(task.labels)
        self.text = (
            TextEncoder(config)
            if config.embeddings is None
            else KeptText(config.embeddings, config)
        )
        self.labs = LabEncoder(config.labs, config.items) if config.use_labs else None
        self.no_labs = StandIn(config.labs.dim)
        inputs = (self.text.width, config.labs.dim)
        if config.fusion == "concat":
            self.head: nn.Module = ConcatPerceptron(
                inputs=inputs, width=config.width, classes=classes, dropout=config.dropout
            )
        else:
            self.fusion = DisentangledTransformer(
                inputs=inputs,
                **config.model_dump(include=SIZES),
            )
            self.head = DenseFusion(width=config.width, classes=classes, dropout=config.dropout)
            self.critic = ConditionalGaussian(
                inputs=2 * config.width, outputs=config.width, hidden=config.critic_hidden
            )
        self.phases = self._phases()

    def forward(self, batch: Batch) -> Output:
        """One pass over a batch.

        Raises:
            InputError: It has more lab columns than `items`.
        """
        text = self.text_vectors(batch)
        labs = self._lab_vectors(batch)
        features = {"text": text, "labs": labs}
        if self.config.fusion == "concat":
            logits = self.head(text, labs).float()
            return Output(logits, features, focal_terms(logits, batch, self.config, self.task))
        s_a, s_b, s_c = self.fusion(text, labs)
        features |= {"text_specific": s_a, "labs_specific": s_b, "shared": s_c}
        logits = self.head(s_a, s_b, s_c).float()
        terms = focal_terms(logits, batch, self.config, self.task)
        if self.config.weighs_information:
            terms |= self._information(batch, torch.cat((s_a, s_b), 1), s_c)
        return Output(logits, features, terms)

    def _lab_vectors(self, batch: Batch) -> Tensor:
        """[B, D] float32."""
        labs, observed = present_labs(batch, self.config.items)
        if self.labs is None:
            nothing = labs.new_zeros(len(batch), self.config.labs.dim)
            return self.no_labs(nothing, torch.zeros_like(observed[:, 0]))
        vectors = self.labs.pool(self.labs(labs, observed)).float()
        return self.no_labs(vectors, observed.any(1))

    def _information(self, batch: Batch, x: Tensor, y: Tensor) -> dict[str, Term]:
        """Between x = concat(s_a, s_b), [B, 2d], and y = s_c, [B, d]."""
        weight, printed = self.config.mi_weight, self.config.mi_update == "printed"
        x, y = x.float(), F.layer_norm(y.float(), y.shape[1:])
        counted = torch.full((len(y),), bool(len(batch.rows)), device=y.device)
        given, told = (x, y) if printed else (x.detach(), y.detach())
        mean, log_variance = self.critic(given)
        likelihood = log_likelihood(mean, log_variance, told)
        mean, log_variance = self.critic(x, not printed)
        by_row = vclub_by_row(mean, log_variance, y, counted)
        return {
            "nll": term(-likelihood, batch, (), -weight if printed else 1.0),
            "vclub": term(by_row, batch, (), weight),
        }

    def _phases(self) -> tuple[Phase, ...]:
        objective = (self.config.term,)
        network = tuple(name for name, _ in self.named_children() if name != "critic")
        if not self.config.weighs_information:
            return (Phase(parameters=network, terms=objective),)
        weighed = ("vclub", "nll") if self.config.mi_update == "printed" else ("vclub",)
        rising = dict.fromkeys(weighed, self.config.mi_warmup)
        if self.config.mi_update != "alternating":
            return (Phase(terms=(*objective, "vclub", "nll"), rising=rising),)
        return (
            Phase("critic", ("critic",), ("nll",), repeats=self.config.critic_updates),
            Phase("all", network, (*objective, "vclub"), rising=rising),
        )
