"""DrFuse (Yao et al., AAAI 2024): disentangled representations and disease-aware attention.

Its image encoders are on their own here (`cxr_encoder.shared`, `cxr_encoder.distinct`); the
released code, which shares their first convolution, does not run as published.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from fusion.encoders.image import Depth, ImageOptions, TwinResNet
from fusion.encoders.time_series import TransformerEncoder, TransformerOptions
from fusion.layers.disease_attention import ClasswiseHead, DiseaseAttention
from fusion.layers.pooling import logit_pool
from fusion.layers.present import MissingImage, keep_present, present_images, present_series
from fusion.losses.alignment import bernoulli_jsd, one_sided_jsd, squared_distance
from fusion.losses.orthogonality import absolute_cosine
from fusion.losses.ranking import attention_ranking
from fusion.losses.rows import bce_by_class, rows_with, term
from fusion.model import FusionModel, Output, Term

if TYPE_CHECKING:
    from torch import Tensor

    from data.schema import Batch
    from data.tasks import TaskSpec

EHR, SHARED, CXR = range(3)
"""Rows of H and of the attention: (EHR distinct, shared, CXR distinct)."""

PAIRED = ("ehr", "cxr")


class DrFuse(FusionModel, name="drfuse"):
    """Shared and distinct representations of both modalities, fused per disease (Fig. 1).

    Loss (Eq 12): the task's BCE + lambda1 jsd + lambda2 (orth_ehr + orth_cxr) + lambda3 (ranking +
    aux). Rows without an image (Eq 13) keep the BCE and orth_ehr. A row without a series, which
    the paper has none of, is predicted from the image's two representations alone.

    Submodules: ehr_encoder, cxr_encoder, shared_projection, attention, head, aux_heads.
    Features: the representations, those of the shared pair before pooling, and `attention`
    [B, C, 3] over (ehr_distinct, shared, cxr_distinct).
    """

    modalities = ("ehr", "cxr")
    image_encoder = "cxr_encoder"
    TINY: ClassVar = {
        "hidden": 8,
        "heads": 2,
        "feedforward": 16,
        "depth": 10,
        "base_width": 4,
    }

    class Config(TransformerOptions, ImageOptions, FusionModel.Config):
        """The paper's numbers. Its bold optima are lost; these lambdas are the likely ones."""

        name: Literal["drfuse"] = "drfuse"
        depth: Depth = 50
        """Layers of the residual network; smaller ones are for small images."""
        stem: Literal["per_branch", "shared"] = "per_branch"
        """`shared`: one first convolution and batch norm for both image branches (the code)."""
        missing_image: MissingImage = "not_encoded"
        """`zero_image`: encode zero images, which `jsd: one_sided` then sums over (the code)."""
        alignment: Literal["jsd", "mse"] = "jsd"
        """`mse`: squared distance, and mean instead of logit pooling (ablation, Table 4)."""
        jsd: Literal["bernoulli", "one_sided"] = "bernoulli"
        """`one_sided`: the code's p-terms only, over every encoded row, about half the value."""
        aux_head: Literal["two_layer", "linear"] = "two_layer"
        """The paper's two-layer network (its width unstated: d), or the code's single layer."""
        ranking: bool = True
        """False drops the attention ranking loss (ablation, Table 4)."""
        rank_margin: float = Field(default=0.0, ge=0)
        """Epsilon of Eq 10; never given, 0 in the code."""
        unpaired_terms: Literal["paper", "with_aux"] = "paper"
        """`with_aux`: unpaired rows also train the first two auxiliary heads (the code)."""
        lambda1: float = Field(default=1.0, ge=0)
        """Weight of the alignment; the code's 1 is on the one-sided form: try 0.5 on the full."""
        lambda2: float = Field(default=1.0, ge=0)
        """Weight of the orthogonality; with lambda1 = 0 too: not disentangled (Table 4)."""
        lambda3: float = Field(default=0.5, ge=0)
        """Weight of the attention ranking and of the auxiliary heads."""

    def __init__(self, config: Config, task: TaskSpec) -> None:
        super().__init__(config, task)
        self.config = config
        width, classes = config.hidden, len(task.labels)
        self.ehr_encoder = TransformerEncoder(
            **config.model_dump(include=set(TransformerOptions.model_fields)), branches=2
        )
        self.cxr_encoder = TwinResNet(
            depth=config.depth,
            base_width=config.base_width,
            width=width,
            stem=config.stem,
            image_weights=config.image_weights,
        )
        self.shared_projection = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.ReLU(),
            nn.Linear(2 * width, width),
            nn.ReLU(),
            nn.Linear(width, width),
        )
        self.attention = DiseaseAttention(width=width, classes=classes)
        self.head = ClasswiseHead(width=width, classes=classes)
        self.aux_heads = nn.ModuleList(_aux_head(width, classes, config.aux_head) for _ in range(3))

    def forward(self, batch: Batch) -> Output:
        """One pass over a batch."""
        has_ehr, has_cxr = batch.present["ehr"], batch.present["cxr"]
        ehr = self.ehr_encoder(*present_series(batch))
        with present_images(batch, self.cxr_encoder, self.config.missing_image) as images:
            encoded = self.cxr_encoder(images.values)
            cxr_shared = images.scatter(self.shared_projection(encoded[:, 0]))
            cxr_distinct = keep_present(images.scatter(encoded[:, 1]), has_cxr)
        ehr_shared = keep_present(self.shared_projection(ehr[:, 0]), has_ehr)
        ehr_distinct = keep_present(ehr[:, 1], has_ehr)
        shared = self._pool(ehr_shared, cxr_shared, has_ehr, has_cxr)
        stacked = torch.stack((ehr_distinct, shared, cxr_distinct), 1)
        available = torch.stack((has_ehr, torch.ones_like(has_ehr), has_cxr), 1)
        fused, attention = self.attention(stacked, available)
        features = {
            "ehr_distinct": ehr_distinct,
            "shared": shared,
            "cxr_distinct": cxr_distinct,
            "ehr_shared": ehr_shared,
            "cxr_shared": cxr_shared,
            "attention": attention,
        }
        terms = self._disentangling(batch, features, images.available)
        terms |= self._auxiliary(batch, stacked, attention)
        return Output(self.head(fused).float(), features, terms)

    def _pool(self, ehr: Tensor, cxr: Tensor, has_ehr: Tensor, has_cxr: Tensor) -> Tensor:
        """The shared representation of Eq 3, [B, D]: pooled if both are there, else the one."""
        both = logit_pool(ehr, cxr) if self.config.alignment == "jsd" else (ehr + cxr) / 2
        one = torch.where(has_ehr[:, None], ehr, keep_present(cxr, has_cxr))
        return torch.where((has_ehr & has_cxr)[:, None], both, one)

    def _disentangling(
        self, batch: Batch, features: dict[str, Tensor], encoded: Tensor
    ) -> dict[str, Term]:
        """Alignment over paired rows (Eq 1) and orthogonality of each modality (Eq 4)."""
        config = self.config
        ehr, cxr = features["ehr_shared"], features["cxr_shared"]
        rows = rows_with(batch, PAIRED)
        if config.alignment == "mse":
            by_row = squared_distance(ehr, cxr).mean(1)
        elif config.jsd == "one_sided":
            by_row = one_sided_jsd(ehr, cxr).sum(1)
            rows = batch.present["ehr"] & encoded
        else:
            by_row = bernoulli_jsd(ehr, cxr).sum(1)
        aligned = Term(torch.where(rows, by_row, 0.0).sum(), PAIRED, config.lambda1)
        orth_ehr = absolute_cosine(ehr, features["ehr_distinct"])
        orth_cxr = absolute_cosine(cxr, features["cxr_distinct"])
        return {
            config.alignment: aligned,
            "orth_ehr": term(orth_ehr, batch, ("ehr",), config.lambda2),
            "orth_cxr": term(orth_cxr, batch, PAIRED, config.lambda2),
        }

    def _auxiliary(self, batch: Batch, stacked: Tensor, attention: Tensor) -> dict[str, Term]:
        """BCE of a head on each representation (Eq 9), means over classes, and Eq 10."""
        config = self.config
        losses = torch.stack(
            [
                bce_by_class(head(stacked[:, i]), batch.targets)
                for i, head in enumerate(self.aux_heads)
            ],
            -1,
        )
        over = PAIRED if config.unpaired_terms == "paper" else ("ehr",)
        by_head = losses.mean(1)
        terms = {
            "aux_ehr": term(by_head[:, EHR], batch, over, config.lambda3),
            "aux_shared": term(by_head[:, SHARED], batch, over, config.lambda3),
            "aux_cxr": term(by_head[:, CXR], batch, PAIRED, config.lambda3),
        }
        if config.ranking:
            by_row = attention_ranking(attention, losses, config.rank_margin)
            terms["ranking"] = term(by_row, batch, PAIRED, config.lambda3)
        return terms


def _aux_head(width: int, classes: int, kind: Literal["two_layer", "linear"]) -> nn.Module:
    if kind == "linear":
        return nn.Linear(width, classes)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))
