"""Weights from elsewhere: ImageNet trunks, and the checkpoints MedFuse's authors released.

Nothing here unpickles code: files are safetensors, or read by torch's weights-only loader.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data.errors import InputError
from data.tasks import TaskSpec
from fusion import registry

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

_POINTER = b"version https://git-lfs"

_MEDFUSE_NAMES = {
    "ehr_model.layer0.": "ehr_encoder.layers.0.",
    "ehr_model.layer1.": "ehr_encoder.layers.1.",
    "cxr_model.vision_backbone.": "cxr_encoder.",
    "projection.": "projection.",
    "lstm_fusion_layer.": "fusion.lstm.",
    "lstm_fused_cls.0.": "head.",
}
_MEDFUSE_UNUSED = (
    "ehr_model.dense_layer.",
    "cxr_model.classifier.0.",
    "fused_cls.0.",
)


def load_image_weights(network: nn.Module, path: Path) -> None:
    """Copy a trunk's weights from torchvision's file for it; its classifier `fc` is left out.

    Args:
        network: A residual network with torchvision's names; it may end at an earlier stage.
        path: .safetensors, or a state dict that torch saved.

    Raises:
        InputError: No such file, not readable as weights, or not this network's names and shapes.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such file of image weights; set model.image_weights to an existing one, "
            "or to null if a checkpoint provides the weights"
        )
    state = read_state(path)
    wanted = network.state_dict()
    ignored = tuple(
        f"layer{stage}." for stage in range(1, 5) if not hasattr(network, f"layer{stage}")
    )
    given = {name: value for name, value in state.items() if not name.startswith(("fc.", *ignored))}
    for name, value in wanted.items():
        if name.endswith("num_batches_tracked"):
            given.setdefault(name, value)
    _refuse_mismatch(given, wanted, path, "this image encoder's depth and width")
    network.load_state_dict(given)


def import_medfuse(path: Path) -> dict[str, Tensor]:
    """The weights of a `.pth.tar` that MedFuse's authors released, under our `medfuse`'s names.

    Takes the fusion model: both encoders, the projection, the fusion LSTM and its head. The
    uni-modal heads and the early-fusion head that the file also holds are not part of it.

    Returns:
        A state dict for `medfuse` with the paper's numbers and as many classes as the file has.

    Raises:
        InputError: No such file; a Git LFS pointer instead of weights; not readable; or its names
            or shapes are not those of the released model (each is listed).
    """
    state = read_state(path)
    given: dict[str, Tensor] = {}
    unknown = []
    for name, value in state.items():
        if name.startswith(_MEDFUSE_UNUSED):
            continue
        prefix = next((old for old in _MEDFUSE_NAMES if name.startswith(old)), None)
        if prefix is None:
            unknown.append(name)
        else:
            given[_MEDFUSE_NAMES[prefix] + name.removeprefix(prefix)] = value
    if unknown:
        raise InputError(
            f"{path}: not a MedFuse checkpoint as released: unexpected {_listed(unknown)}; "
            "give the .pth.tar of the fusion model"
        )
    classes = len(given["head.bias"]) if "head.bias" in given else 1
    _refuse_mismatch(given, _medfuse_state(classes), path, "the released MedFuse fusion model")
    return given


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict of a .safetensors file, or of a file of torch (also under `state_dict`).

    Raises:
        InputError: No such file, a Git LFS pointer, or not readable as plain weights.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such weights file; give the path of an existing one")
    with path.open("rb") as handle:
        start = handle.read(len(_POINTER))
    if start == _POINTER:
        raise InputError(
            f"{path}: a Git LFS pointer of {path.stat().st_size} bytes, not weights; "
            "fetch the file itself (git lfs pull)"
        )
    try:
        content = _read_weights(path)
    except OSError:
        raise
    except Exception as error:  # a damaged file fails in any of the reader's steps
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{path}: cannot be read as plain weights ({reason}); "
            "give a safetensors file or a state dict saved by torch"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: holds no state dict; give a file of named tensors")
    odd = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if odd:
        raise InputError(f"{path}: {_listed(odd)} are no tensors; give a file of named tensors")
    return content


def _read_weights(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(str(error)) from None
    with torch.serialization.safe_globals(_numpy_scalars()):
        return torch.load(path, map_location="cpu", weights_only=True)


def _numpy_scalars() -> list[Any]:
    """What a pickled numpy number consists of, under its names in numpy 1 and 2."""
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    kinds = {type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")}
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [*((scalar, name) for name in names), np.dtype, *kinds]


def _medfuse_state(classes: int) -> dict[str, Tensor]:
    spec = TaskSpec(name="imported", kind="multilabel", labels=("",) * classes)
    model = registry.get("medfuse")
    with torch.device("meta"):
        return model(model.Config(name=model.name), spec).state_dict()


def _refuse_mismatch(
    given: dict[str, Tensor], wanted: dict[str, Tensor], path: Path, owner: str
) -> None:
    problems = []
    if missing := [name for name in wanted if name not in given]:
        problems.append(f"missing {_listed(missing)}")
    if unexpected := [name for name in given if name not in wanted]:
        problems.append(f"unexpected {_listed(unexpected)}")
    if reshaped := [
        f"{name} {tuple(given[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]:
        problems.append(f"of another shape {_listed(reshaped)}")
    if problems:
        raise InputError(
            f"{path}: not the weights of {owner}: {'; '.join(problems)}; give the file made for it"
        )


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
