"""The uni-modal Transformer of DrFuse's comparison (Yao et al. 2024, section 4.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from fusion.encoders.time_series import TransformerEncoder, TransformerOptions
from fusion.layers.present import keep_present, present_series
from fusion.model import FusionModel, Output

if TYPE_CHECKING:
    from data.schema import Batch
    from data.tasks import TaskSpec


class Transformer(FusionModel, name="transformer"):
    """DrFuse's series encoder with the distinct branch alone, and a linear head.

    A row without a series gets the head's bias.
    """

    modalities = ("ehr",)
    TINY: ClassVar = {"hidden": 8, "heads": 2, "feedforward": 16}

    class Config(TransformerOptions, FusionModel.Config):
        """The paper's numbers."""

        name: Literal["transformer"] = "transformer"

    def __init__(self, config: Config, task: TaskSpec) -> None:
        super().__init__(config, task)
        self.ehr_encoder = TransformerEncoder(**config.model_dump(exclude={"name"}))
        self.ehr_head = nn.Linear(config.hidden, len(task.labels))

    def forward(self, batch: Batch) -> Output:
        """One pass over a batch."""
        branches = self.ehr_encoder(*present_series(batch))
        encoded = keep_present(branches[:, 0], batch.present["ehr"])
        return Output(self.ehr_head(encoded).float(), {"ehr": encoded})
