"""One actor of `rayfuse data embed`: row numbers of the shards to vectors of their texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from data.errors import InputError
from data.reader import ShardReader
from fusion.encoders.text_store import text_key
from fusion.training.text_vectors import text_vectors
from ray_jobs import inference
from ray_jobs.texts import pairs

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Order:
    """What an actor is to do.

    Attributes:
        folder: Of the run, absolute.
        shards: Absolute.
        weights: Hash of the run's best weights.
        tokens_per_pass: Most tokens of a pass.
    """

    folder: Path
    shards: Path
    weights: str
    tokens_per_pass: int


class Embedder:
    """One actor: a run's text encoder; from row numbers to vectors.

    A fault of the input is a value, since Ray would retry an error.
    """

    def __init__(self, order: Order, threads: int | None = None) -> None:
        self._order, self._fault = order, ""
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            self._open()
        except InputError as error:
            self._fault = str(error)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """The keys, vectors and counts of some rows' texts, as bytes."""
        if self._fault:
            return {"fault": self._fault, "keys": b"", "vectors": b"", "counts": b""}
        read = pairs(self._reader, item["rows"], self._options.text)
        vectors, counts = text_vectors(
            self._model.text, read, self._config.train, self._order.tokens_per_pass
        )
        return {
            "fault": "",
            "keys": b"".join(text_key(*pair) for pair in read),
            "vectors": vectors.numpy().tobytes(),
            "counts": counts.numpy().tobytes(),
        }

    def _open(self) -> None:
        trained = inference.load(self._order.folder)
        if trained.meta["sha256"] != self._order.weights:
            raise InputError(
                f"{self._order.folder}: its best weights have changed meanwhile; end its training, "
                "or wait for it, and start again"
            )
        self._config = trained.config
        self._options: Any = trained.config.model
        self._model: Any = trained.model.eval()
        self._reader = ShardReader(self._order.shards, trained.config.data.batches.cache_dir)
