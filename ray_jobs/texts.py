"""The texts of shards by row, and whether a store of kept vectors has them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from data.errors import InputError
from fusion.encoders.text_store import Store, text_key
from fusion.encoders.text_tokens import as_read

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from data.reader import ShardReader
    from fusion.encoders.text_tokens import TextSource
    from ray_jobs.config import RunConfig

SPLITS: Final = ("train", "val", "test")
_BLOCK: Final = 512

logger = logging.getLogger(__name__)


class Text(NamedTuple):
    """What a row's text is known by, once it is no longer in memory.

    Attributes:
        row: Of the shards.
        key: `text_key` of what is read.
        size: Characters.
    """

    row: int
    key: bytes
    size: int


def pairs(reader: ShardReader, rows: Sequence[int], source: TextSource) -> list[tuple[str, str]]:
    """What is read of each of some rows: the note, and the sentence of results."""
    chosen = np.asarray(rows, np.int64)
    both = zip(reader.notes(chosen), reader.lab_texts(chosen), strict=True)
    return [as_read(*pair, source) for pair in both]


def texts_of(reader: ShardReader, split: str, source: TextSource) -> Iterator[Text]:
    """The texts of a split; a row without one is left out."""
    every = reader.rows_of(split).tolist()
    for first in range(0, len(every), _BLOCK):
        rows = every[first : first + _BLOCK]
        for row, pair in zip(rows, pairs(reader, rows, source), strict=True):
            if any(pair):
                yield Text(row, text_key(*pair), sum(map(len, pair)))


def refuse_missing(config: RunConfig, splits: Sequence[str]) -> None:
    """Refuse a run whose store of kept vectors lacks some that it will read.

    Raises:
        InputError: It does, or there is no whole store of the run's text model.
    """
    from data.reader import ShardReader
    from fusion.encoders.kept_text import refuse_other_options

    model: Any = config.model
    if getattr(model, "embeddings", None) is None:
        return
    store = Store(model.embeddings)
    refuse_other_options(store, model)
    logger.info("%s: texts' vectors are those of `%s`", config.name, store.served.command)
    reader = ShardReader(config.data.shards, config.data.batches.cache_dir)
    for split in splits:
        found = [
            store.find(text.row, text.key) is not None
            for text in texts_of(reader, split, model.text)
        ]
        if not all(found):
            raise InputError(
                f"model.embeddings: {store.folder} lacks {len(found) - sum(found)} of {len(found)} "
                f"texts of the {split} split; run `{store.served.command}`"
            )
