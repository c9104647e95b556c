"""Outputs of a frozen image encoder, computed once and read by every later run of the same key.

An encoder that is not trained, fed with images that are not augmented, gives the same output for a
row in every epoch, run and trial. The outputs lie in files of a few rows, each whole or absent and
with a hash; workers and trials that compute at once divide the missing files among themselves.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data.errors import InputError
from data.files import sha256_json
from fusion.hashed import DamagedError, digest, read_hashed, write_hashed
from fusion.training.agreed import AgreedError, agreed
from fusion.training.objective import autocast, images_last

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from data.schema import Batch, BatchStream
    from fusion.model import FusionModel
    from fusion.training.config import TrainConfig
    from fusion.training.loop import Session

    Rows = NDArray[np.int64]

FORMAT = 1
"""Part of every key: raise the number when an encoder's code gives other outputs."""
WAIT_S = 0.2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageRows:
    """The images of a split, as evaluation sees them.

    Attributes:
        rows: [N] int64, ascending: every row of the split that has an image.
        read: From some of these rows, a chunk at a time, to a batch of each chunk, in order.
    """

    rows: Rows
    read: Callable[[Iterable[Rows]], Iterator[Batch]]


@dataclass(frozen=True)
class Source:
    """What embeddings are made from, and where they are kept.

    Attributes:
        folder: On a disk of this node.
        splits: Those that a run reads, by name.
        made_from: What decides the images beside their split: shards, preset, transforms.
        chunk: Rows of a file.
    """

    folder: Path
    splits: Mapping[str, ImageRows]
    made_from: Mapping[str, Any]
    chunk: int = 64


class Embedded:
    """A stream whose batches hold an encoder's outputs in place of pixels."""

    def __init__(self, stream: BatchStream, rows: Rows, outputs: Tensor) -> None:
        """Replace the images of `stream`; `outputs` [N, ...] are those of `rows` [N], ascending."""
        self._stream = stream
        self._rows = rows
        self._outputs = outputs

    @property
    def steps_per_epoch(self) -> int:
        """As the stream's."""
        return self._stream.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch | None]:
        """As the stream's, `cxr` [P, ...] being the encoder's outputs."""
        for share in self._stream.epoch(epoch, start_step):
            if share is None:
                yield None
                continue
            places = np.searchsorted(self._rows, share.rows[share.cxr_index.numpy()])
            yield replace(share, cxr=self._outputs[torch.from_numpy(places)])


class PassedOn:
    """An encoder's forward pass where the batch holds its outputs already."""

    def __init__(self, shape: torch.Size) -> None:
        self._shape = shape

    def __call__(self, images: Tensor) -> Tensor:
        """[P, ...] as they are."""
        assert images.shape[1:] == self._shape, "pixels reached an encoder whose outputs are read"
        return images


def encoder_of(model: FusionModel) -> nn.Module:
    """The frozen encoder whose outputs `train.cache_embeddings` keeps.

    Raises:
        InputError: The model trains it.
    """
    name = model.image_encoder
    assert name is not None, "the run's config refuses other models"
    encoder = model.get_submodule(name)
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        raise InputError(
            f"train.cache_embeddings: {name} is trained, so its outputs change; set "
            f"optim.group_lr.{name}=0, or train.cache_embeddings=false"
        )
    return encoder


def embed(session: Session, source: Source) -> dict[str, Any]:
    """Let a session read its encoder's outputs; compute those that no run has computed here yet.

    Every worker calls it, once the model has its weights and before the strategy wraps it.

    Returns:
        For the log: files that all workers `computed`, and those among them that were `damaged`.

    Raises:
        AgreedError: There is no image, one cannot be decoded, or the disk is full.
    """
    strategy, config = session.strategy, session.settings.train
    encoder = encoder_of(strategy.model)
    kept: dict[str, Tensor] = {}
    computed = damaged = 0
    with strategy.whole(encoder), _evaluated(encoder), torch.no_grad():
        key = {**source.made_from, **_identity(encoder, config, strategy.device)}
        key["chunk"] = source.chunk
        for split, images in source.splits.items():
            folder = source.folder / sha256_json({**key, "split": split})[:32]
            shelf = Shelf(folder, images.rows, source.chunk, strategy.rank / strategy.world)
            compute = partial(_encode, session, encoder, images)
            kept[split] = agreed(strategy, partial(shelf.outputs, compute))
            computed, damaged = computed + shelf.computed, damaged + shelf.damaged
    shapes = [outputs.shape[1:] for outputs in kept.values() if len(outputs)]
    if not shapes:
        raise AgreedError(
            "train.cache_embeddings: no row of the shards' train and val splits has an image; set "
            "it to false"
        )
    session.image_shape = shapes[0]
    encoder.forward = PassedOn(shapes[0])
    session.train, session.val = (
        Embedded(stream, source.splits[split].rows, kept[split].reshape(-1, *shapes[0]))
        for split, stream in (("train", session.train), ("val", session.val))
    )
    told = strategy.gather((computed, damaged))
    return {"computed": sum(each[0] for each in told), "damaged": sum(each[1] for each in told)}


class Shelf:
    """The outputs of one split under one key: a file for every few rows.

    Attributes:
        computed: Files that were computed here.
        damaged: Those among them that were there, but not whole.
    """

    def __init__(self, folder: Path, rows: Rows, chunk: int, start: float = 0.0) -> None:
        """Open the shelf of a key.

        Args:
            folder: Named by the key.
            rows: [N] int64, ascending.
            chunk: Rows of a file.
            start: Share of the files after which to begin, so that workers meet late.
        """
        self.computed = self.damaged = 0
        self._folder = folder
        self._chunks = np.split(rows, range(chunk, len(rows), chunk)) if len(rows) else []
        first = int(start * len(self._chunks))
        self._order = [*range(first, len(self._chunks)), *range(first)]
        self._held: dict[int, Tensor] = {}

    def outputs(self, compute: Callable[[Iterable[Rows]], Iterator[Tensor]]) -> Tensor:
        """[N, ...] the output of each row; [0] where there is no row.

        Args:
            compute: From the rows of some chunks, asked for one after the other and perhaps ahead,
                to their outputs in order.

        Raises:
            InputError: The disk is full.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self._folder / ".lock").open("w") as lock:
            while len(self._held) < len(self._chunks):
                before = len(self._held)
                claimed: deque[int] = deque()
                for output in compute(self._claims(lock.fileno(), claimed)):
                    number = claimed.popleft()
                    self._put(number, output)
                    fcntl.lockf(lock, fcntl.LOCK_UN, 1, number)
                if len(self._held) == before:
                    time.sleep(WAIT_S)  # others compute what is left
        if not self._held:
            return torch.empty(0)
        return torch.cat([self._held[number] for number in range(len(self._chunks))])

    def _claims(self, lock: int, claimed: deque[int]) -> Iterator[Rows]:
        """The rows of missing chunks that no one else is at, each locked."""
        for number in self._order:
            if number in self._held or self._find(number):
                continue
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except (BlockingIOError, PermissionError):
                continue
            if self._find(number, last=True):
                fcntl.lockf(lock, fcntl.LOCK_UN, 1, number)
                continue
            claimed.append(number)
            yield self._chunks[number]

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.safetensors"

    def _find(self, number: int, *, last: bool = False) -> bool:
        """Take a chunk from its file; False where that is absent or not whole."""
        path = self._path(number)
        if not path.is_file():
            return False
        try:
            tensors = read_hashed(path)
            if np.array_equal(tensors["rows"].numpy(), self._chunks[number]):
                self._held[number] = tensors["outputs"]
                return True
            fault = "it holds other rows"
        except (DamagedError, KeyError) as error:
            fault = str(error)
        if last:
            self.damaged += 1
            logger.warning("%s: damaged (%s); computed again", path, fault)
        return False

    def _put(self, number: int, outputs: Tensor) -> None:
        tensors = {"rows": torch.from_numpy(self._chunks[number]), "outputs": outputs.contiguous()}
        try:
            write_hashed(self._path(number), tensors)
        except OSError as error:
            raise InputError(
                f"{self._folder}: cannot be written ({os.strerror(error.errno or 0)}); free space "
                "there, or set data.batches.cache_dir to another disk"
            ) from None
        self._held[number] = outputs
        self.computed += 1


def _encode(
    session: Session, encoder: nn.Module, images: ImageRows, chunks: Iterable[Rows]
) -> Iterator[Tensor]:
    device, config = session.strategy.device, session.settings.train
    for batch in images.read(chunks):
        session.beat("embeddings", session.progress)
        moved = images_last(batch.to(device), config)
        with autocast(device, config):
            outputs: Tensor = encoder(moved.cxr)
        yield outputs.cpu()


def _identity(encoder: nn.Module, config: TrainConfig, device: torch.device) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "weights": digest(encoder.state_dict()),
        "structure": f"{type(encoder).__qualname__} {encoder!r}",
        "precision": config.precision,
        "channels_last": config.channels_last,
        "device": device.type,
        "torch": torch.__version__,
    }


@contextmanager
def _evaluated(encoder: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
