"""Reading checkpoints and best weights; `saver` writes them.

Whatever does not verify is never loaded: the checkpoint before it is.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from data.errors import InputError
from data.files import atomic_path, sha256_file, write_json
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


def newest_complete(folder: Path) -> Found:
    """The newest checkpoint whose every hash holds."""
    skipped: dict[str, str] = {}
    for candidate in reversed(candidates(folder)):
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


def write_weights(folder: Path, model: nn.Module, meta: dict[str, Any]) -> list[Path]:
    """Write a model's weights as model.safetensors with meta.json (what best/ holds).

    Returns:
        The files, in the order they were written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file(detached(dict(model.state_dict())), temporary)
    write_json(folder / META, {**meta, "format": FORMAT, "sha256": sha256_file(folder / WEIGHTS)})
    return [folder / WEIGHTS, folder / META]


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


def detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory (tied weights, gradient buckets), as safetensors wants them."""
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }


def candidates(folder: Path) -> list[Path]:
    """Folders of checkpoints, complete or not, the oldest first."""
    if not folder.is_dir():
        return []
    numbered = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [path for match, path in sorted(_by_step(numbered), key=lambda item: item[0])]


def _by_step(numbered: Iterable[tuple[re.Match[str] | None, Path]]) -> list[tuple[int, Path]]:
    return [(int(match[1]), path) for match, path in numbered if match is not None]
