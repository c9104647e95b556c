"""Models with one text branch: what the loop asks of them is asked of that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusion.encoders.text_tokens import Tally
from fusion.model import FusionModel

if TYPE_CHECKING:
    from torch import Tensor

    from data.schema import Batch
    from data.tasks import TaskSpec
    from fusion.encoders.kept_text import KeptText
    from fusion.encoders.text import TextEncoder
    from fusion.model import Reference


class ReadsText(FusionModel):
    """Base of models whose submodule `text` turns rows' texts into vectors."""

    text: TextEncoder | KeptText

    def __init__(self, config: Any, task: TaskSpec) -> None:
        super().__init__(config, task)
        self._tally = Tally()

    def text_vectors(self, batch: Batch) -> Tensor:
        """[B, D] float32 vectors of a batch's texts, zeros without one; counted in training."""
        text: Any = self.text  # what one read gives is what its own rows take
        texts = text.read(batch)
        if self.training and len(batch.rows):
            self._tally.add(texts)
        vectors: Tensor = text.rows(texts, batch.targets.device)[0]
        return vectors

    def references(self) -> dict[str, Reference]:
        """What the text branch has read and nothing trains."""
        return self.text.references("text")

    def passes(self, batch: Batch, tokens: int) -> list[list[int]] | None:
        """Rows whose texts a pass holds."""
        return self.text.passes(batch, tokens)

    def tally(self) -> dict[str, float]:
        """Texts read, once for each pass, and what the limit of their length cut."""
        return self._tally.take()
