"""Rows of the cohort become one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from data.errors import InputError
from data.plan import row_words
from data.schema import N_FEATURES, Batch
from data.series import expand
from data.transforms import IMAGENET_MEAN, IMAGENET_STD, pixels

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from data.batches import BatchConfig
    from data.normalise import Normalizer
    from data.reader import Series

    Rows = NDArray[np.int64]


class Source(Protocol):
    """Where rows come from: a ShardReader, or `data.episodes.Episodes`."""

    folder: Path
    has_ehr: NDArray[np.bool_]
    has_cxr: NDArray[np.bool_]
    labels: NDArray[np.float32]
    cxr_labels: NDArray[np.float32]

    def series(self, rows: Rows, max_steps: int | None = None) -> Series:
        """The series of `rows`, each cut to its first `max_steps` bins."""
        ...

    def image(self, row: int) -> bytes:
        """The JPEG bytes of a row that has an image."""
        ...


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """A batch as small as it can travel: grey bytes instead of float images.

    Attributes:
        ehr: [B, T, 76] float32, normalised, zero beyond each length.
        lengths: [B] int64, >= 1.
        grey: [P, S, S] uint8, images of the rows that have one and keep it; S = 0 where they are
            not decoded.
        cxr_index: [P] int64, the row of each image.
        rows: [B] int64, row ids.
        draws: [B] uint64, `data.plan.row_words`.
    """

    ehr: NDArray[np.float32]
    lengths: Rows
    grey: NDArray[np.uint8]
    cxr_index: Rows
    rows: Rows
    draws: NDArray[np.uint64]


class Packer:
    """From row ids to packed batches; the same for any number of workers and processes."""

    def __init__(
        self,
        reader: Source,
        config: BatchConfig,
        normalizer: Normalizer,
        *,
        train: bool,
        seed: int,
        pixels: bool = True,
    ) -> None:
        """Pack rows of `reader`; without `pixels`, images are counted but not decoded."""
        self._reader = reader
        self._config = config
        self._normalizer = normalizer
        self._train = train
        self._seed = seed
        self._pixels = pixels

    def pack(self, rows: Rows, epoch: int, withheld: NDArray[np.bool_]) -> PackedBatch:
        """The batch of `rows` ([B]) in an epoch, without the images of `withheld` ([B] bool)."""
        series = self._reader.series(rows, self._config.max_steps)
        features = expand(series.values, series.observed)
        self._normalizer.apply(features)
        with_image = np.flatnonzero(self._reader.has_cxr[rows] & ~withheld)
        size = self._config.image.size if self._pixels else 0
        grey = np.empty((len(with_image), size, size), np.uint8)
        for place, row in enumerate(rows[with_image].tolist() if self._pixels else ()):
            key = (self._seed, epoch, row) if self._train else None
            try:
                grey[place] = pixels(self._reader.image(row), self._config.image, key)
            except InputError as error:
                raise InputError(f"{self._reader.folder}: row {row}: {error}") from None
        return PackedBatch(
            ehr=pad(features, series),
            lengths=np.maximum(series.lengths, 1),
            grey=grey,
            cxr_index=with_image.astype(np.int64),
            rows=rows,
            draws=row_words(self._seed, epoch, rows),
        )


def pad(features: NDArray[np.float32], series: Series) -> NDArray[np.float32]:
    """[sum of lengths, 76] to [B, T, 76], zero on the right; T >= 1."""
    lengths = series.lengths
    steps = max(int(lengths.max(initial=1)), 1)
    if len(lengths) and (lengths == steps).all():
        return features.reshape(len(lengths), steps, N_FEATURES)
    padded = np.zeros((len(lengths), steps, N_FEATURES), np.float32)
    start = 0
    for row, length in enumerate(lengths.tolist()):
        padded[row, :length] = features[start : start + length]
        start += length
    return padded


def to_batch(packed: PackedBatch, reader: Source) -> Batch:
    """The batch a model gets."""
    import torch

    rows = packed.rows
    present = np.zeros(len(rows), bool)
    present[packed.cxr_index] = True
    return Batch(
        ehr=torch.from_numpy(packed.ehr),
        lengths=torch.from_numpy(packed.lengths),
        cxr=images_of(torch.from_numpy(packed.grey)),
        cxr_index=torch.from_numpy(packed.cxr_index),
        present={
            "ehr": torch.from_numpy(reader.has_ehr[rows]),
            "cxr": torch.from_numpy(present),
        },
        targets=torch.from_numpy(reader.labels[rows]),
        cxr_targets=torch.from_numpy(reader.cxr_labels[rows[packed.cxr_index]]),
        rows=rows,
        draws=packed.draws,
    )


def images_of(grey: torch.Tensor) -> torch.Tensor:
    """[P, S, S] uint8 to [P, 3, S, S] float32: three equal channels, ImageNet mean and std."""
    import torch

    count, size, _ = grey.shape
    images = torch.empty((count, 3, size, size))
    scaled = grey.float()
    for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)):
        torch.mul(scaled, 1 / (255 * std), out=images[:, channel])
        images[:, channel] -= mean / std
    return images
