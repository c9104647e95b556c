"""The uni-modal LSTM of MedFuse (Hayat et al. 2022, section 3.1): stage 1, and a baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from fusion.encoders.time_series import LSTMEncoder, LSTMOptions
from fusion.layers.present import keep_present, present_series
from fusion.model import FusionModel, Output

if TYPE_CHECKING:
    from data.schema import Batch
    from data.tasks import TaskSpec


class LSTM(FusionModel, name="lstm"):
    """g_ehr(f_ehr(x)). A row without a series gets the head's bias."""

    modalities = ("ehr",)
    TINY: ClassVar = {"hidden": 8}

    class Config(LSTMOptions, FusionModel.Config):
        """The paper's numbers."""

        name: Literal["lstm"] = "lstm"

    def __init__(self, config: Config, task: TaskSpec) -> None:
        super().__init__(config, task)
        self.ehr_encoder = LSTMEncoder(hidden=config.hidden, dropout=config.dropout)
        head = nn.Linear(config.hidden, len(task.labels))
        nn.init.xavier_uniform_(head.weight)
        nn.init.zeros_(head.bias)
        self.ehr_head = head

    def forward(self, batch: Batch) -> Output:
        """One pass over a batch."""
        encoded = keep_present(self.ehr_encoder(*present_series(batch)), batch.present["ehr"])
        return Output(self.ehr_head(encoded).float(), {"ehr": encoded})
