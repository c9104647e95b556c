"""RunConfig: composes the blocks that components own; load, override, dump."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml
from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from data.batches import BatchConfig
from data.config import Config
from data.errors import InputError
from data.files import write_text
from data.switches import ExtractConfig, Sources
from data.tasks import task_spec
from fusion import registry
from fusion.metrics.config import EvaluateConfig
from fusion.training.config import SCORES, CheckpointConfig, Offload, StrategyName, TrainConfig
from fusion.training.optim import OptimConfig
from ray_jobs import storage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusion.model import FusionModel

ConfigT = TypeVar("ConfigT", bound=Config)
Preset = Literal["corrected", "code", "paper"]
PRESETS = Path(__file__).parent / "presets"
CONFIGS = Path(__file__).parent / "configs"


class ScalingConfig(Config):
    """Ray's own field names."""

    num_workers: int | tuple[int, int] = 1
    """Workers, or [fewest, most]: as many as the cluster has room for, shrinking and growing with
    it."""
    use_gpu: bool = False
    resources_per_worker: dict[str, float] = Field(default_factory=dict)
    """Ray's, e.g. {CPU: 4, GPU: 1}. A worker computes with that many CPU threads; where CPU is not
    given, a node's workers share its cores."""
    strategy: StrategyName = "ddp"
    """`ddp` holds everything on every worker; `zero1` shards the optimizer's state over them,
    `zero2` the gradients too, `zero3` the parameters too."""
    offload: Offload = "none"
    """What a ZeRO strategy keeps in the host's memory: `optimizer` its state and the update, `all`
    the parameters too (zero3)."""
    max_failures: int = Field(default=3, ge=0)
    """Times that lost workers are started again, from the newest complete checkpoint."""
    hang_after_s: float = Field(default=1800.0, gt=0)
    """No worker moves on for that long: the run is stopped, naming the rank that lags. Workers
    that start have ten minutes at least."""
    wait_for_nodes_s: float = Field(default=600.0, ge=0)
    """How long lost nodes, or those that an autoscaler may add, are waited for."""
    resize_every_s: float = Field(default=60.0, gt=0)
    """With [fewest, most]: how often the cluster is looked at for room for more workers."""

    @field_validator("num_workers", mode="before")
    @classmethod
    def _workers(cls, value: Any) -> Any:
        numbers = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
        if not all(type(each) is int and each >= 1 for each in numbers) or numbers[0] > numbers[1]:
            raise ValueError("needs a number of workers from 1 on, or [fewest, most]")
        return value if isinstance(value, int) else tuple(numbers)

    @model_validator(mode="after")
    def _shardable(self) -> ScalingConfig:
        if self.offload != "none" and self.strategy in ("single", "ddp"):
            raise ValueError(
                f"offload={self.offload} with strategy={self.strategy}: only ZeRO can offload; set "
                "strategy=zero2, or offload=none"
            )
        if self.offload == "all" and self.strategy != "zero3":
            raise ValueError(
                f"offload=all with strategy={self.strategy}: only zero3 shards the parameters; set "
                "strategy=zero3, or offload=optimizer"
            )
        return self

    @property
    def least(self) -> int:
        """Fewest workers that the run goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most(self) -> int:
        """Most workers that it uses."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class DataConfig(Config):
    """Which shards a run reads, and how they are made if they are absent."""

    shards: Path
    """Folder of extracted shards with its manifest.json."""
    allow_mixed: bool = False
    """Accept shards of another preset than the run's; every result then says so."""
    sources: Sources = Sources()
    extract: ExtractConfig = ExtractConfig()
    batches: BatchConfig = BatchConfig()


class RunConfig(Config):
    """One run: one YAML plus dotted overrides."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's folder under `runs_dir`."""
    note: str = ""
    """A sentence on what the run is, shown at the head of its report."""
    runs_dir: Path = Path("runs")
    """Folder that holds the folders of runs."""
    storage_path: str | None = None
    """Where runs are kept: a folder, in place of `runs_dir`; or s3://BUCKET/PREFIX or gs://..., to
    which each run's folder is copied as it trains, and fetched from before it starts."""
    preset: Preset = "corrected"
    task: str
    model: SerializeAsAny[Config]
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    scaling: ScalingConfig = ScalingConfig()
    init_from: dict[str, Path] = Field(default_factory=dict)
    """Submodule prefix -> run folder (its best weights) or weights file to start from, e.g.
    {ehr_encoder: runs/lstm, cxr_encoder: runs/resnet34}."""
    seed: int = 0
    """Seeds weights, sample order, augmentation and dropout."""

    @field_validator("model", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, Config):
            return value
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise ValueError("model needs a name, e.g. `model: {name: medfuse}`")
        return registry.get(value["name"]).Config.model_validate(value)

    @model_validator(mode="after")
    def _coherent(self) -> RunConfig:
        if self.storage_path is not None and (wrong := storage.fault(self.storage_path)):
            raise ValueError(wrong)
        spec = task_spec(self.task)
        kind = registry.get(self.model.name)  # type: ignore[attr-defined]
        if not set(kind.modalities) & set(spec.modalities):
            raise ValueError(
                f"model.name={kind.name} reads {', '.join(kind.modalities)}, but task={self.task} "
                f"holds {', '.join(spec.modalities)}: choose another model or task"
            )
        if self.train.selection_metric not in (metrics := (*SCORES, *kind.counted)):
            raise ValueError(
                f"train.selection_metric={self.train.selection_metric}: model.name={kind.name} has "
                f"no such score; choose one of {', '.join(metrics)}"
            )
        items, top = getattr(self.model, "items", None), self.data.batches.labs.top
        if items is not None and items < top:
            raise ValueError(
                f"model.items ({items}) is less than data.batches.labs.top ({top}): set the first "
                "to the second"
            )
        missing = [prefix for prefix in kind.pretrained if prefix not in self.init_from]
        if missing and "" not in self.init_from:
            raise ValueError(
                f"init_from: model.name={kind.name} keeps {', '.join(missing)} frozen, so it needs "
                f"trained weights, e.g. init_from.{missing[0]}=runs/lstm"
            )
        if getattr(self.model, "embeddings", None) is not None:
            self._refuse_text_settings()
        if self.train.min_epochs > self.train.epochs:
            raise ValueError(
                f"train.min_epochs ({self.train.min_epochs}) is larger than "
                f"train.epochs ({self.train.epochs})"
            )
        if self.train.cache_embeddings and (wrong := self._unsteady(kind)):
            raise ValueError(f"train.cache_embeddings: {wrong}, or train.cache_embeddings=false")
        if self.scaling.most > 1 and self.scaling.strategy == "single":
            raise ValueError(
                f"scaling.strategy=single with scaling.num_workers={self.scaling.num_workers}: "
                "use ddp, or one worker"
            )
        return self

    def _refuse_text_settings(self) -> None:
        """Kept vectors take the place of the text branch: nothing of it can be set."""
        blocks = (("init_from", self.init_from), ("optim.group_lr", self.optim.group_lr))
        for place, block in blocks:
            if set_here := [name for name in block if name.split(".")[0] == "text"]:
                raise ValueError(
                    f"{place}.{set_here[0]}: with model.embeddings the text branch has no weights; "
                    "leave it out, or set model.embeddings=null"
                )

    def _unsteady(self, kind: type[FusionModel]) -> str | None:
        """Why an image encoder's output for a row would change from epoch to epoch, if it would."""
        if kind.image_encoder is None:
            return f"model.name={kind.name} has no image encoder for it: choose another model"
        if self.data.batches.image.augment:
            return "images are augmented: set data.batches.image.augment=false"
        if self.data.batches.image.crop != "center":
            return "images are cropped at random: set data.batches.image.crop=center"
        if getattr(self.model, "missing_image", "not_encoded") != "not_encoded":
            return "zero images are encoded too: set model.missing_image=not_encoded"
        return None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        kept = self.storage_path
        home = self.runs_dir if kept is None or storage.in_bucket(kept) else Path(kept)
        return home / self.name


def load(path: Path, overrides: Sequence[str] = ()) -> list[RunConfig]:
    """The runs of a YAML file, in order: one, or those of its `stages:` list.

    Precedence: schema default < preset < run file < override. With stages, what stands beside
    `stages:` is common to all, and each stage adds its own; an override applies to every stage.

    Raises:
        InputError: The file is missing or no YAML mapping, or a key or value is wrong; everything
            wrong is reported at once, each with its dotted path.
    """
    document = read_yaml(path)
    stages = document.pop("stages", [{}])
    flat = dict(_parse_override(item) for item in overrides)
    return [
        from_document(_merge(_merge(document, stage), _nest(flat)), place=str(path))
        for stage in stages
    ]


def dump(config: RunConfig, path: Path) -> None:
    """Write the resolved config as YAML."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def from_dump(value: dict[str, Any]) -> RunConfig:
    """The config that `model_dump` gave: what workers and run folders hold; presets are in it."""
    return RunConfig.model_validate(value)


def extract_config(preset: Preset, overrides: Sequence[str] = ()) -> ExtractConfig:
    """The extraction switches of a preset, overridden by switch=value items.

    Raises:
        InputError: An unknown switch or a wrong value.
    """
    prefix = "data.extract."
    values = {
        dotted.removeprefix(prefix): value
        for dotted, value in preset_values(preset).items()
        if dotted.startswith(prefix)
    }
    given = _nest(dict(_parse_override(item) for item in overrides))
    return checked(ExtractConfig, _merge(_nest(values), given), place="extraction switches")


def preset_values(preset: Preset) -> dict[str, Any]:
    """The dotted paths of a preset file."""
    return read_yaml(PRESETS / f"{preset}.yaml") or {}


def from_document(document: dict[str, Any], *, place: str) -> RunConfig:
    """The run of a nested mapping, its preset applied beneath it; `place` heads error messages.

    Raises:
        InputError: A key or value is wrong.
    """
    preset = document.get("preset", "corrected")
    if preset not in ("corrected", "code", "paper"):
        raise InputError(f"{place}: preset {preset!r}; choose corrected, code or paper")
    applicable = {
        dotted: value
        for dotted, value in preset_values(preset).items()
        if _applies(dotted, document)
    }
    plain = {plain_path(dotted): value for dotted, value in applicable.items()}
    return checked(RunConfig, _merge(_nest(plain), document), place=place)


def checked(block: type[ConfigT], values: dict[str, Any], *, place: str) -> ConfigT:
    """A block of these values; everything wrong is reported at once, headed by `place`.

    Raises:
        InputError: A key or value is wrong.
    """
    try:
        return block.model_validate(values)
    except ValidationError as error:
        lines = [_explain(block, item) for item in error.errors()]
        raise InputError(f"{place}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def from_items(block: type[ConfigT], items: Sequence[str], *, place: str) -> ConfigT:
    """A block of dotted.key=value items.

    Raises:
        InputError: A key or value is wrong.
    """
    return checked(block, _nest(dict(_parse_override(item) for item in items)), place=place)


def _applies(dotted: str, document: dict[str, Any]) -> bool:
    """`model[drfuse].x` or `optim[medfuse].x` applies only to runs of that model."""
    if "[" not in dotted:
        return True
    wanted = dotted.split("[", 1)[1].split("]", 1)[0].split("|")
    return document.get("model", {}).get("name") in wanted


def plain_path(dotted: str) -> str:
    """A preset's path without the models it is limited to."""
    if "[" not in dotted:
        return dotted
    return dotted.split("[", 1)[0] + dotted.split("]", 1)[1]


def _explain(root: type[Config], item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"]) or "(run)"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(path.split(".")[-1], _known_keys(root, path), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{path}: unknown key{hint}"
    if item["type"] == "missing":
        return f"{path}: required, but missing"
    return f"{path}: {message} (got {item['input']!r})" if path != "(run)" else message


def _known_keys(root: type[Config], path: str) -> list[str]:
    block: Any = root
    for part in path.split(".")[:-1]:
        annotation = block.model_fields[part].annotation if part in block.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, Config)):
            return list(block.model_fields)
        block = annotation
    return list(block.model_fields)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file; an empty file is an empty one.

    Raises:
        InputError: It cannot be read, or is something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a mapping of keys, but got {type(document).__name__}")
    return document


def _parse_override(item: str) -> tuple[str, Any]:
    key, equals, value = item.partition("=")
    if not equals or not key:
        raise InputError(f"override {item!r}: write dotted.path=value, e.g. optim.lr=3e-4")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        return key, value


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for dotted, value in flat.items():
        *parents, leaf = dotted.split(".")
        block = nested
        for parent in parents:
            block = block.setdefault(parent, {})
        block[leaf] = value
    return nested


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
