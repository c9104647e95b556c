"""The order of samples: a pure function of (seed, epoch, position), whatever the workers.

Every draw is keyed: its value depends on what it is for, the epoch and an index, never on what
was drawn before, so any step of any epoch is reached without replaying another.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Rows = NDArray[np.int64]

BLOCK_ROWS = 256
_WORD = (1 << 64) - 1


class Purpose(IntEnum):
    """What a draw is for; draws of different purposes are independent."""

    BLOCKS = 1
    WINDOW = 2
    UNPAIRED = 3
    WITHHOLD = 4
    AUGMENT = 5
    ROW = 6


def draw(seed: int, purpose: Purpose, epoch: int, index: int, count: int) -> NDArray[np.uint64]:
    """`count` uniform 64-bit words keyed by everything before them (Philox 4x64, counter mode)."""
    key = np.array([seed & _WORD, purpose], np.uint64)
    counter = np.array([0, index, epoch, 0], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Words as float64 in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def row_words(seed: int, epoch: int, rows: Rows) -> NDArray[np.uint64]:
    """[B] a word of each row ([B] row ids) in an epoch, whatever batch the row is in."""
    words = [draw(seed, Purpose.ROW, epoch, row, 1)[0] for row in rows.tolist()]
    return np.array(words, np.uint64)


def permutation(seed: int, purpose: Purpose, epoch: int, index: int, count: int) -> Rows:
    """A keyed permutation of range(count)."""
    return np.argsort(draw(seed, purpose, epoch, index, count), kind="stable")


def split_evenly(count: int, rank: int, world_size: int) -> slice:
    """The contiguous part of `count` items of one rank: 16 on 3 is 6, 5, 5."""
    base, extra = divmod(count, world_size)
    start = rank * base + min(rank, extra)
    return slice(start, start + base + (rank < extra))


def blocks_of(rows: Rows, block_rows: int = BLOCK_ROWS) -> list[Rows]:
    """Rows, sorted, grouped by the block of `block_rows` neighbours in which they lie on disk."""
    ordered = np.sort(rows, kind="stable")
    borders = np.flatnonzero(np.diff(ordered // block_rows)) + 1
    return np.split(ordered, borders) if len(ordered) else []


class SamplePlan:
    """The global batches of every epoch.

    A shuffled epoch permutes the blocks, then the rows within each window of `window` blocks in
    that order, so that a disk is read in long runs. Every row is used exactly once an epoch; the
    last batch is short, never padded.
    """

    def __init__(
        self,
        blocks: Sequence[Rows],
        batch_size: int,
        seed: int,
        *,
        shuffle: bool,
        window: int = 64,
        drop_last: bool = False,
    ) -> None:
        """Plan over the rows of `blocks`.

        Args:
            blocks: Row ids, a block being rows that lie together on disk.
            batch_size: Rows of a global batch, over all workers.
            seed: Seed of every epoch's order.
            shuffle: False keeps the blocks' order in every epoch.
            window: Blocks within which rows are mixed.
            drop_last: Leave out a short last batch (the authors' training loader).
        """
        if batch_size < 1 or window < 1:
            raise ValueError(f"batch_size ({batch_size}) and window ({window}) must be >= 1")
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self._blocks = [np.asarray(block, np.int64) for block in blocks]
        self._sizes = np.array([len(block) for block in self._blocks], np.int64)
        self._per_window = window if shuffle else max(len(self._blocks), 1)
        self._drop_last = drop_last
        self._order: tuple[int, Rows, Rows] | None = None
        self._window: tuple[tuple[int, int], Rows] | None = None

    def __len__(self) -> int:
        """Rows of an epoch, those of a dropped last batch counted."""
        return int(self._sizes.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch, the short last one counted unless it is dropped."""
        whole, rest = divmod(len(self), self.batch_size)
        return whole + (rest > 0 and not self._drop_last)

    def batch(self, epoch: int, step: int) -> Rows:
        """Row ids of one global batch, in order.

        Raises:
            IndexError: The epoch has no such step.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch} steps")
        start = step * self.batch_size
        stop = min(start + self.batch_size, len(self))
        _, starts = self._layout(epoch)
        first = int(np.searchsorted(starts, start, side="right")) - 1
        last = int(np.searchsorted(starts, stop, side="left")) - 1
        parts = []
        for number in range(first, last + 1):
            rows = self._rows_of_window(epoch, number)
            offset = int(starts[number])
            parts.append(rows[max(start - offset, 0) : stop - offset])
        return np.concatenate(parts)

    def share(self, epoch: int, step: int, rank: int, world_size: int) -> Rows:
        """One rank's contiguous part of a global batch; it may be empty in a short last batch."""
        rows = self.batch(epoch, step)
        return rows[split_evenly(len(rows), rank, world_size)]

    def _layout(self, epoch: int) -> tuple[Rows, Rows]:
        """The epoch's order of blocks, and the position at which each window starts."""
        if self._order is None or self._order[0] != epoch:
            count = len(self._blocks)
            order = (
                permutation(self.seed, Purpose.BLOCKS, epoch, 0, count)
                if self.shuffle
                else np.arange(count)
            )
            before = np.cumsum(self._sizes[order]) - self._sizes[order]
            self._order = (epoch, order, before[:: self._per_window])
        return self._order[1], self._order[2]

    def _rows_of_window(self, epoch: int, number: int) -> Rows:
        key = (epoch, number)
        if self._window is None or self._window[0] != key:
            order, _ = self._layout(epoch)
            first = number * self._per_window
            chosen = order[first : first + self._per_window]
            rows = np.concatenate([self._blocks[block] for block in chosen])
            if self.shuffle:
                rows = rows[permutation(self.seed, Purpose.WINDOW, epoch, number, len(rows))]
            self._window = (key, rows)
        return self._window[1]


def select_rows(
    candidates: Rows,
    paired: NDArray[np.bool_],
    *,
    rows: Literal["partial", "paired"],
    seed: int,
    unpaired_fraction: float = 1.0,
    with_replacement: bool = False,
) -> Rows:
    """The rows of a split that are used, sorted.

    Args:
        candidates: Row ids of the split.
        paired: For each candidate, whether it has an image.
        rows: `paired` leaves out all rows without an image.
        seed: Seed of the choice of unpaired rows.
        unpaired_fraction: r keeps all paired rows and int(r * unpaired) distinct unpaired ones
            (MedFuse's OPTIMAL); a smaller r keeps a subset of what a larger one keeps.
        with_replacement: Draw the unpaired rows with replacement, as the authors' released code
            does in its PARTIAL sets, instead of each once.
    """
    candidates = np.asarray(candidates, np.int64)
    chosen = candidates[paired]
    if rows == "paired":
        return np.sort(chosen)
    unpaired = np.sort(candidates[~np.asarray(paired, bool)])
    count = int(unpaired_fraction * len(unpaired))
    if with_replacement:
        words = draw(seed, Purpose.UNPAIRED, 1, 0, count)
        extra = unpaired[(uniform(words) * len(unpaired)).astype(np.int64)]
    else:
        extra = unpaired[permutation(seed, Purpose.UNPAIRED, 0, 0, len(unpaired))[:count]]
    return np.sort(np.concatenate([chosen, extra]))


def withheld(seed: int, epoch: int, step: int, count: int, fraction: float) -> NDArray[np.bool_]:
    """Which rows of a global batch of `count` have their image withheld: floor(fraction * count).

    DrFuse's matched training: 30 % of each mini-batch of 16 is 4 rows.
    """
    mask = np.zeros(count, bool)
    number = int(np.floor(fraction * count + 1e-9))
    if number:
        mask[permutation(seed, Purpose.WITHHOLD, epoch, step, count)[:number]] = True
    return mask
