"""Checkpoints: step-<n>/{rank-<r>/*.safetensors, meta.json, COMPLETE}, never pickled.

Each worker writes what it owns. meta.json holds the position, the schedule and the SHA-256 of
every file; COMPLETE, written last, holds that of meta.json. Whatever does not verify is never
loaded: the one before it is.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from data.errors import InputError
from data.files import atomic_path, sha256_file, write_json, write_text
from fusion.training.strategy import refuse_leftovers

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from fusion.training.strategy import Strategy

FORMAT = 2
COMPLETE = "COMPLETE"
META = "meta.json"
WEIGHTS = "model.safetensors"
_NAME = re.compile(r"step-(\d+)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that verifies, and those passed over on the way to it.

    Attributes:
        path: Its folder, or None where there is none.
        meta: Its meta.json.
        skipped: Folder name -> why it was not taken.
    """

    path: Path | None
    meta: dict[str, Any]
    skipped: dict[str, str]


def save(
    folder: Path, step: int, strategy: Strategy, meta: dict[str, Any], *, num_to_keep: int
) -> Path:
    """Write the checkpoint of a step; every worker calls it, and worker 0 completes it.

    Args:
        folder: The run's checkpoints.
        step: Updates so far; names the checkpoint.
        strategy: Gives the state, and knows the workers.
        meta: JSON values to keep beside it.
        num_to_keep: Complete checkpoints that stay; older ones, and torn ones, are removed.

    Returns:
        The checkpoint's folder, on every worker.
    """
    target = folder / f"step-{step:08d}"
    strategy.align()
    if strategy.rank == 0:
        _remove(target)
        target.mkdir(parents=True)
    strategy.share(None)
    own = target / f"rank-{strategy.rank:04d}"
    hashes = {
        f"{own.name}/{name}": _write(own / name, tensors)
        for name, tensors in {
            "weights.safetensors": dict(strategy.weights()),
            "moments.safetensors": dict(strategy.moments()),
            "random.safetensors": random_state(strategy.device),
        }.items()
    }
    files = {name: digest for part in strategy.gather(hashes) for name, digest in part.items()}
    if strategy.rank == 0:
        document = {**meta, "format": FORMAT, "world": strategy.world, "files": files}
        write_json(target / META, document)
        write_text(target / COMPLETE, sha256_file(target / META) + "\n")
        _prune(folder, target, num_to_keep)
    strategy.share(None)
    return target


def lacking_space(folder: Path, shapes: Mapping[str, torch.Size], num_to_keep: int) -> str | None:
    """What is wrong with the free space of a run's folder, or None.

    Counted: fp32 weights and two moments for each checkpoint that is kept and for the one being
    written beside them, and the best weights twice, less what the folder holds already.
    """
    weights = 4 * sum(shape.numel() for shape in shapes.values())
    needed = weights * (3 * (num_to_keep + 1) + 2)
    held = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    free = shutil.disk_usage(folder).free
    if free + held >= needed:
        return None
    return (
        f"{folder}: {free / 1e9:.2f} GB free, but {num_to_keep} checkpoints and the best weights "
        f"take up to {needed / 1e9:.2f} GB; free space there, set runs_dir to another disk, or "
        "lower checkpoint.num_to_keep"
    )


def newest_complete(folder: Path) -> Found:
    """The newest checkpoint whose every hash holds."""
    skipped: dict[str, str] = {}
    for candidate in reversed(_candidates(folder)):
        fault = verify(candidate)
        if fault is None:
            meta = json.loads((candidate / META).read_text(encoding="utf-8"))
            return Found(candidate, meta, skipped)
        skipped[candidate.name] = fault
        logger.warning("checkpoint %s passed over: %s", candidate.name, fault)
    return Found(None, {}, skipped)


def verify(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    marker, meta = checkpoint / COMPLETE, checkpoint / META
    try:
        if not marker.is_file():
            return f"no {COMPLETE}: it was not finished"
        if marker.read_bytes() != f"{sha256_file(meta)}\n".encode():
            return f"{META} is not the one that {COMPLETE} names"
        document = json.loads(meta.read_text(encoding="utf-8"))
        if document.get("format") != FORMAT:
            return f"format {document.get('format')!r}, but this version reads {FORMAT}"
        for name, digest in document["files"].items():
            if sha256_file(checkpoint / name) != digest:
                return f"{name} was altered"
    except FileNotFoundError as error:
        return f"a file is missing: {error.filename}"
    except OSError as error:
        return f"unreadable: {error}"
    return None


@dataclass(frozen=True)
class Held:
    """What a verified checkpoint holds.

    Attributes:
        path: Its folder.
        meta: Its meta.json.
    """

    path: Path
    meta: dict[str, Any]

    def weights(self, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Every parameter and buffer.

        Args:
            shapes: Of the model that is to be filled.

        Raises:
            InputError: It is the checkpoint of another model.
        """
        found = self._merged("weights.safetensors")
        for name, shape in shapes.items():
            if name not in found:
                raise InputError(
                    f"the checkpoint lacks {name!r}; continue with the run's own config, or start "
                    "a new run"
                )
            if found[name].shape != shape:
                raise InputError(
                    f"the checkpoint's {name!r} has shape {tuple(found[name].shape)}, but the "
                    f"model's has {tuple(shape)}; continue with the run's own config"
                )
        refuse_leftovers(found.keys() - shapes.keys())
        return found

    @property
    def moments(self) -> dict[str, Tensor]:
        """The optimizers' slots."""
        return self._merged("moments.safetensors")

    def restore_random(self, strategy: Strategy, seed: int) -> None:
        """Continue torch's generators.

        On as many workers as before they continue where they were; on another number each worker
        draws new ones from (seed, step, rank).
        """
        if self.meta["world"] == strategy.world:
            own = self.path / f"rank-{strategy.rank:04d}" / "random.safetensors"
            set_random_state(load_file(own), strategy.device)
        else:
            seed_worker(seed, strategy.rank, int(self.meta["progress"]["updates"]))

    def _merged(self, kind: str) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name in self.meta["files"]:
            if name.endswith(f"/{kind}"):
                tensors.update(load_file(self.path / name))
        return tensors


def read(found: Found) -> Held:
    """What `newest_complete` found."""
    assert found.path is not None
    return Held(found.path, found.meta)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Torch's generators: what dropout draws from. Data is keyed, and draws from none."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Set torch's generators to a saved state."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def seed_worker(seed: int, rank: int, step: int = 0) -> None:
    """Seed torch for a worker from that step on."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, 2**62, (2,), generator=generator).tolist()
    torch.manual_seed((draws[0] + draws[1] * (rank + 1) + step * 1_000_003) % 2**63)


def write_weights(folder: Path, model: nn.Module, meta: dict[str, Any]) -> None:
    """Write a model's weights as model.safetensors with meta.json (what best/ holds)."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file(_detached(dict(model.state_dict())), temporary)
    write_json(folder / META, {**meta, "format": FORMAT, "sha256": sha256_file(folder / WEIGHTS)})


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and meta.json that write_weights wrote.

    Raises:
        InputError: There are none, or they are not those that meta.json names.
    """
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
        digest = sha256_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise InputError(
            f"{folder}: no {META} with {WEIGHTS}, so no trained model; train the run first"
        ) from None
    except ValueError as error:
        raise InputError(f"{folder / META}: not valid JSON ({error}); train again") from None
    if digest != meta.get("sha256"):
        raise InputError(
            f"{folder / WEIGHTS} is not the file that {META} names; continue the run to restore it"
        )
    return load_file(folder / WEIGHTS), meta


def _write(path: Path, tensors: dict[str, Tensor]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file(_detached(tensors), temporary)
    return sha256_file(path)


def _detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory (tied weights, gradient buckets), as safetensors wants them."""
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }


def _candidates(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    numbered = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [path for match, path in sorted(_by_step(numbered), key=lambda item: item[0])]


def _by_step(numbered: Iterable[tuple[re.Match[str] | None, Path]]) -> list[tuple[int, Path]]:
    return [(int(match[1]), path) for match, path in numbered if match is not None]


def _prune(folder: Path, newest: Path, num_to_keep: int) -> None:
    """Remove torn checkpoints and all but the newest complete ones."""
    others = [path for path in reversed(_candidates(folder)) if path != newest]
    complete = [path for path in others if (path / COMPLETE).is_file()]
    kept = complete[: num_to_keep - 1]
    for path in others:
        if path not in kept:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    # The marker goes first: a removal cut short leaves nothing that looks complete.
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
