"""Reading checkpoints and best weights; `saver` writes them.

Whatever does not verify is never loaded: the checkpoint before it is.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from safetensors.torch import load_file, save_file

from data.errors import InputError
from data.files import atomic_path, sha256_file, sha256_json, write_json
from fusion.training.progress import Progress
from fusion.training.stored import Joined, Stored
from fusion.training.strategy import persistent_buffers, refuse_leftovers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from fusion.training.strategy import Strategy

FORMAT = 3
COMPLETE = "COMPLETE"
META = "meta.json"
WORKER = "worker.safetensors"
_NAME = re.compile(r"step-(\d+)")
_RANDOM, _BUFFER = "random/", "buffer/"
_PARTS = "parts-"

logger = logging.getLogger(__name__)


class Base(BaseModel):
    """Frozen parameters that a checkpoint leaves to the source that they came from."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    source: str
    """Its path when they were read."""
    sha256: str
    """Of their names, types, shapes and values: `fusion.hashed.digest`."""
    names: tuple[str, ...]
    setting: str = "model.backbone"
    """Path in a run's config that names what a constructor reads."""


class Meta(BaseModel):
    """meta.json of a checkpoint; beside these, whatever the run's document holds."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    format: int
    world: PositiveInt
    """Workers that wrote it."""
    progress: Progress
    schedule: dict[str, Any]
    files: dict[str, str]
    """Path below the checkpoint -> SHA-256."""
    base: dict[str, Base]
    """By prefix of `init_from`."""
    referenced: dict[str, Base] = {}
    """What the model's constructor reads itself, by prefix."""


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that verifies, and those passed over on the way to it.

    Attributes:
        path: Its folder, or None where there is none.
        meta: Its meta.json.
        skipped: Folder name -> why it was not taken.
    """

    path: Path | None
    meta: Meta | None
    skipped: dict[str, str]


class _FaultError(Exception):
    """What is wrong with a checkpoint."""


def newest_complete(folder: Path) -> Found:
    """The newest checkpoint whose every hash holds.

    Raises:
        InputError: A whole one is of another format, so that going on from an older one, or from
            the start, would throw work away.
    """
    skipped: dict[str, str] = {}
    for candidate in reversed(candidates(folder)):
        try:
            return Found(candidate, _verified(candidate), skipped)
        except _FaultError as fault:
            skipped[candidate.name] = str(fault)
            logger.warning("checkpoint %s passed over: %s", candidate.name, fault)
    return Found(None, None, skipped)


def verify(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        _verified(checkpoint)
    except (_FaultError, InputError) as fault:
        return str(fault)
    return None


def _verified(checkpoint: Path) -> Meta:
    marker, meta = checkpoint / COMPLETE, checkpoint / META
    try:
        if not marker.is_file():
            raise _FaultError(f"no {COMPLETE}: it was not finished")
        if marker.read_bytes() != f"{sha256_file(meta)}\n".encode():
            raise _FaultError(f"{META} is not the one that {COMPLETE} names")
        document = _parsed(meta)
        for name, digest in document.files.items():
            if sha256_file(checkpoint / name) != digest:
                raise _FaultError(f"{name} was altered")
    except FileNotFoundError as error:
        raise _FaultError(f"a file is missing: {error.filename}") from None
    except OSError as error:
        raise _FaultError(f"unreadable: {error}") from None
    return document


def _parsed(path: Path) -> Meta:
    raw = path.read_bytes()
    try:
        document = json.loads(raw)
    except ValueError as error:
        raise _FaultError(f"{META} is not valid JSON ({error})") from None
    version = document.get("format") if isinstance(document, dict) else None
    if isinstance(version, int) and version != FORMAT:
        raise InputError(
            f"{path.parent}: a checkpoint of format {version}, but this version of the package "
            f"reads {FORMAT}; go on with the version that wrote it, or train under another name"
        )
    try:
        meta = Meta.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise _FaultError(f"{META}: {where}: {first['msg']}") from None
    if outside := [name for name in meta.files if not _below(name)]:
        raise _FaultError(f"{META} names {outside[0]!r}, which is not below the checkpoint")
    return meta


def _below(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


@dataclass(frozen=True)
class Held:
    """What a verified checkpoint holds.

    Attributes:
        path: Its folder.
        meta: Its meta.json.
    """

    path: Path
    meta: Meta

    def weights(
        self, shapes: Mapping[str, torch.Size], base: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Every parameter and buffer; buffers are worker 0's.

        Args:
            shapes: Of the model that is to be filled.
            base: The parameters that `meta.base` names.

        Raises:
            InputError: It is the checkpoint of another model.
        """
        found = Joined(self._stored("weights.safetensors"), base)
        for name, shape in shapes.items():
            if name not in found:
                raise InputError(
                    f"the checkpoint lacks {name!r}; continue with the run's own config, or start "
                    "a new run"
                )
            if found.shape(name) != tuple(shape):
                raise InputError(
                    f"the checkpoint's {name!r} has shape {found.shape(name)}, but the "
                    f"model's has {tuple(shape)}; continue with the run's own config"
                )
        refuse_leftovers(found.keys() - shapes.keys())
        return found

    @property
    def moments(self) -> Mapping[str, Tensor]:
        """The optimizers' slots."""
        return self._stored("moments.safetensors")

    def refuse_other_data(self, document: Mapping[str, Any]) -> None:
        """Refuse the checkpoint of a run on other shards, or in another schema of them.

        Raises:
            InputError: Its lineage names another manifest than the document of this run.
        """
        theirs = (self.meta.model_extra or {}).get("lineage") or {}
        ours = document.get("lineage") or {}
        before, now = theirs.get("manifest"), ours.get("manifest")
        if before is not None and now is not None and before != now:
            raise InputError(
                f"{self.path}: of a run on other shards (manifest {str(before)[:12]}, but now "
                f"{str(now)[:12]}); put those back, or train under another name"
            )

    def restore_worker(self, strategy: Strategy, seed: int) -> None:
        """Continue torch's generators and this worker's own buffers (running statistics).

        On as many workers as before both continue where they were. On another number each worker
        draws new generators from (seed, step, rank), and keeps the buffers of worker 0.
        """
        if self.meta.world != strategy.world:
            seed_worker(seed, strategy.rank, self.meta.progress.updates)
            return
        own = load_file(self.path / rank_folder(strategy.rank) / WORKER)
        buffers = persistent_buffers(strategy.model)
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(own[_BUFFER + name])
        torch.set_rng_state(own[_RANDOM + "cpu"])
        if strategy.device.type == "cuda" and _RANDOM + "cuda" in own:
            torch.cuda.set_rng_state(own[_RANDOM + "cuda"], strategy.device)

    def _stored(self, kind: str) -> Stored:
        return Stored(self.path / name for name in self.meta.files if name.endswith(f"/{kind}"))


def read(found: Found) -> Held | None:
    """What `newest_complete` found; None where it found nothing."""
    if found.path is None or found.meta is None:
        return None
    return Held(found.path, found.meta)


def worker_state(strategy: Strategy) -> dict[str, Tensor]:
    """What is a worker's own: torch's generators, which dropout draws from, and its buffers.

    Data is keyed by (seed, epoch, sample) and draws from no generator.
    """
    state = {_BUFFER + name: value for name, value in persistent_buffers(strategy.model).items()}
    state[_RANDOM + "cpu"] = torch.get_rng_state()
    if strategy.device.type == "cuda":
        state[_RANDOM + "cuda"] = torch.cuda.get_rng_state(strategy.device)
    return state


def seed_worker(seed: int, rank: int, step: int = 0) -> None:
    """Seed torch for a worker from that step on."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, 2**62, (2,), generator=generator).tolist()
    torch.manual_seed((draws[0] + draws[1] * (rank + 1) + step * 1_000_003) % 2**63)


def write_weights(folder: Path, model: nn.Module, meta: Mapping[str, Any]) -> None:
    """Write a model's weights as best/ holds them, in one part."""
    name = f"{parts_name(0, uuid.uuid4().hex)}/{rank_folder(0)}.safetensors"
    digest = write_tensors(folder / name, detached(model.state_dict().items()))
    switch(folder, {**meta, "files": {name: digest}}, lambda path: None, lambda path: None)


def parts_name(updates: int, nonce: str) -> str:
    """Name of a folder of parts in best/, new each time: what meta.json names is never touched."""
    return f"{_PARTS}{updates:08d}-{nonce[:8]}"


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors as safetensors; the SHA-256 of the file."""
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)
    return sha256_file(path)


def switch(
    folder: Path,
    meta: Mapping[str, Any],
    written: Callable[[Path], None],
    removed: Callable[[Path], None],
) -> None:
    """Make best/ consist of the parts that `meta` names, at once; then remove all others.

    Args:
        folder: best/.
        meta: With `files`, as written.
        written: Told of meta.json once it is there.
        removed: Told of each folder of parts before it is removed.
    """
    # One hash of the weights, whatever the folder of the parts is called.
    digests = sha256_json([meta["files"][name] for name in sorted(meta["files"])])
    write_json(folder / META, {**meta, "format": FORMAT, "sha256": digests})
    written(folder / META)
    named = {name.split("/")[0] for name in meta["files"]}
    for path in sorted(folder.glob(f"{_PARTS}*")):
        if path.name not in named:
            removed(path)
            shutil.rmtree(path)


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and meta.json of best/.

    Raises:
        InputError: There are none, or they are not those that meta.json names.
    """
    while True:
        raw, meta = _best_meta(folder)
        try:
            for name, digest in meta["files"].items():
                if sha256_file(folder / name) != digest:
                    raise InputError(
                        f"{folder / name} is not the file that {META} names; continue the run to "
                        "restore it"
                    )
            return dict(Stored(folder / name for name in meta["files"])), meta
        except FileNotFoundError as error:
            # The run may have found better weights just now; then meta.json is another one.
            if _best_meta(folder)[0] == raw:
                raise InputError(
                    f"{error.filename}: missing, but {META} names it; continue the run to restore "
                    "it, or train the run first"
                ) from None


def _best_meta(folder: Path) -> tuple[bytes, dict[str, Any]]:
    path = folder / META
    try:
        raw = path.read_bytes()
        meta = json.loads(raw)
    except FileNotFoundError:
        raise InputError(f"{folder}: no {META}, so no trained model; train the run first") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); train again") from None
    version = meta.get("format") if isinstance(meta, dict) else None
    if version != FORMAT:
        raise InputError(
            f"{path}: format {version!r}, but this version of the package reads {FORMAT}; use the "
            "version that wrote it, or train again"
        )
    files = meta.get("files")
    if not isinstance(files, dict) or not all(_below(name) for name in files):
        raise InputError(f"{path}: `files` does not name files below it; train again")
    return raw, meta


def detached(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies that share no memory (tied weights, gradient buckets), as safetensors wants them."""
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in tensors
    }


def rank_folder(rank: int) -> str:
    """Name of the folder of a worker's part."""
    return f"rank-{rank:04d}"


def candidates(folder: Path) -> list[Path]:
    """Folders of checkpoints, complete or not, the oldest first."""
    if not folder.is_dir():
        return []
    numbered = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [path for match, path in sorted(_by_step(numbered), key=lambda item: item[0])]


def _by_step(numbered: Iterable[tuple[re.Match[str] | None, Path]]) -> list[tuple[int, Path]]:
    return [(int(match[1]), path) for match, path in numbered if match is not None]
