"""Pretrained language models by path or name: found, checked, and read one tensor at a time.

Weights go to the placement of the strategy (fusion/placement.py) as they are read, so that a
sharded model is never whole on any worker.
"""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from data.errors import InputError
from data.files import sha256_file, sha256_json
from fusion import placement

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

TINY_LLAMA: Final = Path(__file__).parent / "tiny_llama"
"""A configuration and a tokenizer of the family, without weights, for tests."""
CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_HUB_NAME: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PATTERNS: Final = ("*.json", "*.safetensors", "*.model", "*.txt")
_HEADS: Final = ("lm_head.", "score.", "cls.", "classifier.")
_COMPUTED: Final = ("inv_freq", "position_ids", "token_type_ids")


@dataclass(frozen=True)
class Family:
    """What differs between architectures.

    Attributes:
        prefix: Of the backbone's parameters in files that also hold a head.
        pooling: The token whose last hidden state stands for a text: the `last` one of a causal
            model; the `first` one (CLS), through the model's own pooler, of BERT.
        head: Name of the classification layer in transformers' model for sequences.
        head_bias: Whether that layer has one.
    """

    prefix: str
    pooling: Literal["last", "first"]
    head: str
    head_bias: bool


FAMILIES: Final = {
    "llama": Family("model", "last", "score", head_bias=False),
    "mistral": Family("model", "last", "score", head_bias=False),
    "bert": Family("bert", "first", "classifier", head_bias=True),
}


@dataclass(frozen=True)
class Base:
    """A pretrained model on this machine.

    Attributes:
        name: As it was asked for.
        folder: Where its files are.
        revision: The commit of a model from the hub; None for a folder.
        config: Its configuration, of transformers.
    """

    name: str
    folder: Path
    revision: str | None
    config: Any

    @property
    def family(self) -> Family:
        """Of its architecture."""
        return FAMILIES[self.config.model_type]

    @property
    def title(self) -> str:
        """Its name on the hub, or its folder's: what may leave this machine."""
        return self.name if self.revision else self.folder.resolve().name

    def sha256(self) -> str:
        """Of its configuration and weights, wherever they lie; reads all of them."""
        files = [CONFIG, *sorted({path.name for path in WeightFiles(self).paths})]
        return sha256_json({name: sha256_file(self.folder / name) for name in files})


def find_base(name: str, *, revision: str | None = None, offline: bool = True) -> Base:
    """A pretrained model by the path of its folder, or by its name on the hub.

    Args:
        name: `/models/llama-3-8b`, or `meta-llama/Meta-Llama-3-8B`.
        revision: Branch, tag or commit of a model from the hub.
        offline: Take models of the hub from the local cache only.

    Raises:
        InputError: It is not there (the message says where it was looked for), not readable, or of
            an architecture that is not known here.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return Base(name, path, None, _read_config(path))
    if path.is_absolute() or name.startswith(("~", ".")) or not _HUB_NAME.fullmatch(name):
        raise InputError(
            f"model.backbone: no folder {path} (looked up from {Path.cwd()}); give the path of a "
            "downloaded model, or its name on the hub such as meta-llama/Meta-Llama-3-8B"
        )
    folder = _from_hub(name, revision, offline)
    return Base(name, folder, folder.name, _read_config(folder))


def _from_hub(name: str, revision: str | None, offline: bool) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        found = snapshot_download(
            name, revision=revision, local_files_only=offline, allow_patterns=list(_PATTERNS)
        )
    except (OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        what = (
            "and model.offline is true, so it is not fetched: set model.backbone to the path of a "
            "downloaded model, or model.offline=false on a machine with a network"
            if offline
            else f"nor could it be fetched ({type(error).__name__}): check the name, and the access"
        )
        raise InputError(
            f"model.backbone: {name}{at} is neither a folder (looked in {Path.cwd()}) nor in the "
            f"hub's cache (looked in {constants.HF_HUB_CACHE}), {what}"
        ) from None
    return Path(found)


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    path = folder / CONFIG
    if not path.is_file():
        raise InputError(
            f"model.backbone: {folder} holds no {CONFIG}; give the folder of a model in the format "
            "of transformers"
        )
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"model.backbone: {path} is no configuration of a model ({type(error).__name__}); "
            "download it again"
        ) from None
    if kind not in FAMILIES:
        raise InputError(
            f"model.backbone: {path}: model_type {kind!r} is not known here; choose a model of "
            f"type {', '.join(FAMILIES)}"
        )
    return AutoConfig.from_pretrained(folder, local_files_only=True)


class Source(Protocol):
    """Gives a parameter's values by its name in the backbone."""

    def tensor(self, name: str, shape: torch.Size) -> Tensor:
        """Its values on the host."""
        ...


class WeightFiles:
    """The safetensors files of a base; a file is open only while a tensor is read from it."""

    def __init__(self, base: Base) -> None:
        self._folder, self._family = base.folder, base.family
        self._at: dict[str, tuple[Path, str]] = {}
        for stored, path in _listing(base.folder).items():
            self._at[self._canonical(stored)] = (path, stored)

    @property
    def paths(self) -> set[Path]:
        """All files."""
        return {path for path, _ in self._at.values()}

    def check(self, shapes: dict[str, torch.Size]) -> None:
        """Refuse files that are not of the model with these parameters.

        Raises:
            InputError: A parameter is missing, left over or of another shape.
        """
        stored = _stored_shapes(self._at)
        unused = stored.keys() - shapes.keys()
        problems = {
            "lacks": sorted(shapes.keys() - stored.keys()),
            "has no place for": sorted(
                name for name in unused if not name.startswith(_HEADS) and not _computed(name)
            ),
            "has in another shape": sorted(
                name for name in stored.keys() & shapes.keys() if stored[name] != shapes[name]
            ),
        }
        for what, names in problems.items():
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise InputError(
                    f"model.backbone: {self._folder}: its weights are not those that its {CONFIG} "
                    f"describes: {what} {names[0]}{more}; download the model again"
                )

    def tensor(self, name: str, shape: torch.Size) -> Tensor:
        """A parameter's values on the host, in the type they are stored in."""
        from safetensors import safe_open

        path, stored = self._at[name]
        # Closed after each, or all of the file would count as this process's memory. What is
        # given lies in the file until it is copied.
        with safe_open(path, "pt") as handle:
            value: Tensor = handle.get_tensor(stored)
        assert value.shape == shape
        return value

    def _canonical(self, stored: str) -> str:
        name = stored.removeprefix(f"{self._family.prefix}.")
        if self._family.prefix == "bert":
            name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
            name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        return name


class RandomWeights:
    """Values drawn as transformers draws them: N(0, initializer_range), norms 1, biases 0."""

    def __init__(self, std: float) -> None:
        self._std = std

    def tensor(self, name: str, shape: torch.Size) -> Tensor:
        """From torch's generator."""
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        return torch.empty(shape).normal_(0.0, self._std)


def load_backbone(base: Base, source: Source, dtype: torch.dtype, attention: str) -> nn.Module:
    """The backbone without a head, every parameter frozen, of `dtype`, where the placement has it.

    Args:
        base: Says its architecture.
        source: Gives its values.
        dtype: Of its parameters.
        attention: Name of an attention function of transformers.

    Raises:
        InputError: The files are not those of its configuration.
    """
    from transformers import AutoModel
    from transformers.initialization import no_init_weights

    base.config.use_cache = False
    with no_init_weights(), _without_memory():
        backbone: nn.Module = AutoModel.from_config(base.config, attn_implementation=attention)
    shapes = {name: value.shape for name, value in backbone.named_parameters()}
    if isinstance(source, WeightFiles):
        source.check(shapes)
    place = placement.current()
    # Planning builds models without memory; nothing is read for it.
    reads = place.reads and torch.get_default_device().type != "meta"
    # One buffer for all that only passes through here: freed ones would stay with the process.
    passing = torch.empty(0 if reads else max(map(torch.Size.numel, shapes.values())), dtype=dtype)
    for prefix, module in backbone.named_modules():
        for name, shape in [(n, p.shape) for n, p in module.named_parameters(recurse=False)]:
            full = f"{prefix}.{name}" if prefix else name
            value = source.tensor(full, shape) if reads else passing[: shape.numel()].view(shape)
            if not value.is_meta:
                value = value.to(place.device, dtype, copy=not place.shards)
            parameter = nn.Parameter(value, requires_grad=False)
            module.register_parameter(name, parameter)
            place.keep([parameter])
    return backbone


def load_quantised(base: Base, attention: str) -> nn.Module:
    """The backbone in 4 bits (NF4, double quantisation, bf16 compute), on the placement's device.

    Dettmers et al. (2023), section 3. Needs bitsandbytes and CUDA.
    """
    from transformers import AutoModel, BitsAndBytesConfig

    quantised: nn.Module = AutoModel.from_pretrained(
        base.folder,
        local_files_only=True,
        use_safetensors=True,
        attn_implementation=attention,
        dtype=torch.bfloat16,
        device_map={"": placement.current().device},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    return quantised.requires_grad_(False)


@contextmanager
def _without_memory() -> Iterator[None]:
    """Parameters of modules under construction have a shape only; buffers are real."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook: Any = to_meta  # what it gives takes the parameter's place; torch's types do not say so
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _listing(folder: Path) -> dict[str, Path]:
    """Every stored tensor's file.

    Raises:
        InputError: There is no safetensors file, or one that the index names is missing.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise InputError(f"model.backbone: {index}: no index ({error}); download it") from None
        listing = {name: folder / Path(file).name for name, file in places.items()}
        absent = sorted({path.name for path in listing.values() if not path.is_file()})
        if absent:
            raise InputError(
                f"model.backbone: {folder / absent[0]}: missing, but {INDEX} names it; download it"
            )
        return listing
    path = folder / WEIGHTS
    if not path.is_file():
        torch_files = sorted(folder.glob("*.bin"))
        hint = f"; {torch_files[0].name} is not read, convert it" if torch_files else ""
        raise InputError(
            f"model.backbone: {folder} holds neither {WEIGHTS} nor {INDEX}{hint}; give a model "
            "whose weights are in safetensors files, or set model.random_weights"
        )
    with _opened(path) as handle:
        return dict.fromkeys(handle.keys(), path)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as handle:
            yield handle
    except SafetensorError as error:
        raise InputError(
            f"model.backbone: {path}: no safetensors file ({error}); download it again"
        ) from None


def _stored_shapes(at: dict[str, tuple[Path, str]]) -> dict[str, torch.Size]:
    shapes: dict[str, torch.Size] = {}
    for path in {path for path, _ in at.values()}:
        with _opened(path) as handle:
            shapes |= {
                name: torch.Size(handle.get_slice(stored).get_shape())
                for name, (file, stored) in at.items()
                if file == path
            }
    return shapes


def _computed(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in _COMPUTED


def refuse_long(base: Base, max_length: int) -> None:
    """Refuse more tokens than the model has positions for.

    Raises:
        InputError: `max_length` is larger.
    """
    most = base.config.max_position_embeddings
    if max_length > most:
        raise InputError(
            f"model.max_length: {max_length} tokens, but {base.name} has {most} positions; set it "
            f"to {most} or less"
        )
