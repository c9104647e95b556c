"""The text branch of a model that reads a store of kept vectors: no language model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from data.errors import InputError
from fusion.encoders.text_store import Store, template, text_key
from fusion.encoders.text_tokens import pairs_of
from fusion.model import Reference

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from data.schema import Batch
    from fusion.encoders.text import TextOptions
    from fusion.encoders.text_store import Kept


class KeptText(nn.Module):
    """What `TextEncoder` offers a model, without parameters.

    Attributes:
        width: D.
    """

    def __init__(self, folder: Path, options: TextOptions) -> None:
        """Open a store for a model of these options.

        Raises:
            InputError: There is no whole store, or its vectors are of another base, adapter or
                template.
        """
        super().__init__()
        self.options = options
        self.store = Store(folder)
        self.width: int = self.store.width
        refuse_other_options(self.store, options)

    def read(self, batch: Batch) -> list[Kept | None]:
        """[B] each row's vector; None where it has no text.

        Raises:
            InputError: The store lacks some.
        """
        rows = batch.rows.tolist() or [-1] * len(batch)  # a placeholder's rows have no text
        found, missing = [], 0
        for row, pair in zip(rows, pairs_of(batch, self.options.text), strict=True):
            kept = self.store.find(row, text_key(*pair)) if any(pair) else None
            missing += kept is None and any(pair)
            found.append(None if kept is None or not kept.length else kept)
        if missing:
            raise InputError(
                f"model.embeddings: {self.store.folder}: {missing} of a batch's {len(found)} texts "
                f"are not in it; run `{self.store.served.command}`"
            )
        return found

    def rows(self, texts: Sequence[Kept | None], device: torch.device) -> tuple[Tensor, Tensor]:
        """[B, D] rows' vectors, and [B] bool: which rows have one; zeros without."""
        vectors = torch.zeros(len(texts), self.width)
        for row, text in enumerate(texts):
            if text is not None:
                vectors[row] = text.vector
        available = torch.tensor([text is not None for text in texts], device=device)
        return vectors.to(device), available

    def references(self, prefix: str) -> dict[str, Reference]:
        """What the store serves: weights trained on other vectors are refused."""
        source = f"the vectors in {self.store.folder}"
        served = self.store.served.sha256
        return {prefix: Reference(source, frozenset(), lambda: served, "model.embeddings")}

    def passes(self, batch: Batch, tokens: int) -> None:
        """None: a text costs a pass nothing."""


def refuse_other_options(store: Store, options: TextOptions) -> None:
    """Refuse a store whose vectors are of another base, adapter or template.

    Raises:
        InputError: They are; it names each option that differs.
    """
    kept, asked = store.extractor.options, template(options)
    differing = [
        f"  model.{name}: {value!r} here, {kept.get(name)!r} there"
        for name, value in asked.items()
        if kept.get(name) != value
    ]
    if differing:
        listed = "\n".join(differing)
        raise InputError(
            f"model.embeddings: {store.folder} holds vectors of another text model:\n{listed}\n"
            "set the options to those there, or name another store"
        )
