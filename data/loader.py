"""The batches of one worker, in the plan's order, decoded here or in processes of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from data.clinical_batch import with_clinical
from data.collate import to_batch
from data.decoding import DecodingPool, Recipe, Share
from data.errors import InputError
from data.folds import folds_of
from data.lab_scaler import fitted as fitted_labs
from data.normalise import normalizer_for
from data.plan import SamplePlan, blocks_of, select_rows, split_evenly, withheld
from data.reader import ShardReader
from data.tasks import task_spec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from data.batches import BatchConfig
    from data.collate import PackedBatch
    from data.schema import Batch

    Rows = NDArray[np.int64]


class BatchLoader:
    """This rank's share of each global batch, in order: a data.schema.BatchStream.

    Rows, withheld images and augmentation depend on (seed, epoch, step, row) alone: the same for
    any world size and any number of decoding processes.
    """

    def __init__(
        self,
        reader: ShardReader,
        plan: SamplePlan,
        recipe: Recipe,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Batches of `plan` for `rank` of `world_size`; only training augments and withholds.

        Where the recipe leaves pixels out, `cxr` is [P, 3, 0, 0].
        """
        self.reader = reader
        self.plan = plan
        self.config = config = recipe.config
        self._rank = rank
        self._world_size = world_size
        self._recipe = recipe
        self._pool: DecodingPool | None = None
        self._clinical = task_spec(reader.manifest.task).unit == "admission"
        scaled = self._clinical and bool(reader.has_labs.any())
        self._labs = fitted_labs(reader, config.labs) if scaled else None

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch, the short last one counted."""
        return self.plan.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch | None]:
        """This rank's batches from `start_step` on; None where its share of a step is empty."""
        yield from self._batches(
            self.share(epoch, step) for step in range(start_step, self.steps_per_epoch)
        )

    def read(self, chunks: Iterable[Rows]) -> Iterator[Batch]:
        """A batch of each chunk of row ids ([B] each, not empty), whole, nothing withheld.

        Chunks may be asked for ahead. Not within an epoch of the same loader.
        """
        shares = (Share(rows, 0, np.zeros(len(rows), bool)) for rows in chunks)
        for batch in self._batches(shares):
            assert batch is not None
            yield batch

    def _batches(self, shares: Iterable[Share]) -> Iterator[Batch | None]:
        if self.config.processes:
            if self._pool is None:
                self._pool = DecodingPool(self._recipe, self.config.processes)
            yield from self._pool.map(shares, self._finish)
            return
        packer = self._recipe.packer(self.reader)
        for share in shares:
            yield self._finish(packer.pack(*share)) if len(share.rows) else None

    def share(self, epoch: int, step: int) -> Share:
        """This rank's row ids of a step, and which of them have their image withheld."""
        rows = self.plan.batch(epoch, step)
        fraction = self.config.withhold_cxr if self._recipe.train else 0.0
        mask = withheld(self._recipe.seed, epoch, step, len(rows), fraction)
        part = split_evenly(len(rows), self._rank, self._world_size)
        return Share(rows[part], epoch if self._recipe.train else 0, mask[part])

    def _finish(self, packed: PackedBatch) -> Batch:
        batch = to_batch(packed, self.reader)
        return with_clinical(batch, self.reader, self._labs) if self._clinical else batch

    def close(self) -> None:
        """End the decoding processes; a later epoch starts them again."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def open_stream(  # noqa: PLR0913
    shards: Path,
    split: str,
    config: BatchConfig,
    *,
    batch_size: int,
    seed: int,
    train: bool,
    rank: int = 0,
    world_size: int = 1,
    rows: Literal["partial", "paired"] | None = None,
    drop_last: bool = False,
    pixels: bool = True,
) -> BatchLoader:
    """The stream of a split for one rank.

    Args:
        shards: Shard folder with its manifest.
        split: train, val or test.
        config: From shards to batches.
        batch_size: Rows of a global batch, over all ranks.
        seed: Keys the order, the choice of unpaired rows, withholding and augmentation.
        train: Shuffle, augment, withhold, leave out a fold, and use the training rows' fraction of
            unpaired ones.
        rank: This worker.
        world_size: Workers.
        rows: Every row or only those with an image; None takes `train_rows` when training,
            `selection_rows` for the validation split, and every row otherwise.
        drop_last: Leave out an epoch's short last batch.
        pixels: Decode images; else `cxr` is [P, 3, 0, 0].

    Raises:
        InputError: The shards are refused (see ShardReader), or the split has no such row or,
            under `drop_last`, no whole batch of them.
    """
    reader = ShardReader(shards, config.cache_dir)
    if rows is None:
        default = config.selection_rows if split == "val" else "partial"
        rows = config.train_rows if train else default
    candidates = reader.rows_of(split)
    if train and config.leave_out is not None:
        folds = folds_of(reader.subjects(candidates), config.leave_out.of)
        candidates = candidates[folds != config.leave_out.fold]
    chosen = select_rows(
        candidates,
        reader.has_cxr[candidates],
        rows=rows,
        seed=seed,
        unpaired_fraction=config.unpaired_fraction if train else 1.0,
        with_replacement=not train and config.unpaired_evaluation == "with_replacement",
    )
    if not len(chosen):
        with_image = " with an image" if rows == "paired" else ""
        raise InputError(
            f"{shards}: the {split} split has no rows{with_image}; extract more subjects"
            + (", or use the partial rows" if with_image else "")
        )
    plan = SamplePlan(blocks_of(chosen), batch_size, seed, shuffle=train, drop_last=drop_last)
    if not plan.steps_per_epoch:
        raise InputError(
            f"train.drop_last leaves nothing of {len(chosen)} {split} rows in batches of "
            f"{batch_size}; lower train.batch_size or set it to false"
        )
    recipe = Recipe(
        shards,
        config.cache_dir,
        config,
        normalizer_for(reader, config),
        train=train,
        seed=seed,
        pixels=pixels,
    )
    return BatchLoader(reader, plan, recipe, rank=rank, world_size=world_size)
