"""`rayfuse export`: a run's best weights with all that predicting needs, in one folder.

model.safetensors, config.json, preprocessing.json, README.md, and manifest.json with the SHA-256
of the others. No path, host or id of a patient is in it.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.errors import InputError
from data.files import atomic_path, sha256_file, write_json, write_text
from data.tasks import task_spec
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from data.batches import BatchConfig
    from data.episodes import Rules
    from data.manifest import Manifest
    from data.normalise import Normalizer
    from data.tasks import TaskSpec
    from fusion.model import FusionModel
    from fusion.training.config import TrainConfig
    from ray_jobs.inference import Trained

FORMAT = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PREPROCESSING = "preprocessing.json"
CARD = "README.md"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Exported:
    """An export folder, verified, its weights in the model.

    Attributes:
        model: On the CPU.
        spec: Its task.
        settings: Precision and memory format.
        batches: From rows to batches.
        normalizer: The statistics of its training.
        rules: From values to bins.
        extract: How the shards were made that it was trained on.
        digest: Of manifest.json: what its predictions are named by.
    """

    model: FusionModel
    spec: TaskSpec
    settings: TrainConfig
    batches: BatchConfig
    normalizer: Normalizer
    rules: Rules
    extract: dict[str, Any]
    digest: str


def run(run_folder: Path, out: Path) -> Path:
    """Write a run's export; of a language model on notes, its adapters and head as peft has them.

    Args:
        run_folder: runs/<name> with its best weights; its shards are read for the normaliser.
        out: A folder that is absent or empty.

    Raises:
        InputError: No such run, no weights, other shards, something is in `out`, or it is a run of
            admissions without adapters.
    """
    from safetensors.torch import save_file

    from data.normalise import normalizer_for
    from data.reader import ShardReader
    from ray_jobs import inference, model_card

    _refuse_filled(out)
    trained = inference.load(run_folder)
    if task_spec(trained.config.task).unit == "admission":
        return _adapters(trained, out)
    batches = trained.config.data.batches
    reader = ShardReader(trained.config.data.shards, batches.cache_dir)
    inference.check_learnt_on(trained.config, trained.meta, reader.manifest)
    normalizer = normalizer_for(reader, batches)
    with _new(out) as folder:
        folder.mkdir()
        # Copies, for safetensors refuses tensors that share memory (tied weights).
        state = trained.model.state_dict().items()
        save_file(
            {name: value.cpu().contiguous().clone() for name, value in state}, folder / WEIGHTS
        )
        write_json(folder / CONFIG, _config(trained, reader.manifest))
        write_json(folder / PREPROCESSING, _preprocessing(trained, reader.manifest, normalizer))
        card = model_card.text(trained, reader.manifest, RunFolder(run_folder))
        write_text(folder / CARD, card)
        files = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
        write_json(folder / MANIFEST, {"format": FORMAT, "files": files})
        for path in folder.iterdir():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    return out


def _adapters(trained: Trained, out: Path) -> Path:
    from fusion.adapters import write_adapter
    from ray_jobs.predicted import spec_of

    if trained.model.name != "note_llm":
        raise InputError(
            f"{trained.config.name}: a run of {trained.config.task}; of tasks of admissions only "
            "note_llm can be exported, as peft's adapters: score it with `rayfuse evaluate`"
        )
    labels = spec_of(trained.config).labels
    text: Any = trained.model.text
    with _new(out) as folder:
        write_adapter(folder, trained.model.state_dict(), text, labels)
    return out


def load(folder: Path) -> Exported:
    """Read an export, refusing one that was altered.

    Raises:
        InputError: It is none, a file is missing or altered, or another version wrote it.
    """
    from safetensors.torch import load_file

    from data.batches import BatchConfig
    from data.episodes import Rules
    from fusion import registry
    from fusion.training.config import TrainConfig

    _verify(folder)
    config, steps = (_json(folder / name) for name in (CONFIG, PREPROCESSING))
    spec = task_spec(config["task"])
    _refuse_other_features(folder, config, steps, spec)
    kind = registry.get(config["model"]["name"])
    model = kind(kind.Config.model_validate(config["model"]), spec)
    model.load_state_dict(load_file(folder / WEIGHTS))
    image = steps["image"]
    return Exported(
        model=model,
        spec=spec,
        settings=TrainConfig(precision=config["precision"], channels_last=config["channels_last"]),
        batches=BatchConfig.model_validate(
            {
                "max_steps": steps["max_steps"],
                "image": {"resize": image["resize"], "size": image["size"]},
            }
        ),
        normalizer=_normalizer(steps),
        rules=Rules(steps["timestep_hours"], steps["outliers"] == "clip", image["short_side"]),
        extract=steps["extract"],
        digest=sha256_file(folder / MANIFEST),
    )


@contextmanager
def _new(out: Path) -> Iterator[Path]:
    """`atomic_path` of a folder that is absent or empty: it is renamed onto an absent one only."""
    if out.is_dir():
        out.rmdir()
    with atomic_path(out) as folder:
        yield folder


def _refuse_filled(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: holds files already; choose another --out, or empty it")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file is there; choose another --out")


def _config(trained: Trained, manifest: Manifest) -> dict[str, Any]:
    model = trained.config.model.model_dump(mode="json")
    # The weights are here; the file that some of them began with is not needed.
    model.pop("image_weights", None)
    return {
        "format": FORMAT,
        "task": trained.config.task,
        "labels": list(manifest.labels),
        "model": model,
        "precision": trained.config.train.precision,
        "channels_last": trained.config.train.channels_last,
    }


def _preprocessing(trained: Trained, manifest: Manifest, normalizer: Normalizer) -> dict[str, Any]:
    from data.schema import FEATURE_NAMES
    from data.transforms import IMAGENET_MEAN, IMAGENET_STD

    spec, batches = task_spec(trained.config.task), trained.config.data.batches
    extract = {name: value for name, value in manifest.config.items() if name not in _UNSEEN}
    return {
        "timestep_hours": manifest.config["timestep_hours"],
        "window_hours": spec.window_hours,
        "max_steps": batches.max_steps,
        "outliers": manifest.config["outliers"],
        "channels": _channels(normalizer),
        "features": list(FEATURE_NAMES),
        "zero_beyond": normalizer.zero_beyond,
        "image": {
            "short_side": manifest.config["image_short_side"],
            "resize": batches.image.resize,
            "size": batches.image.size,
            "crop": "center",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
        },
        "extract": extract,
    }


_UNSEEN = ("split", "partitions")
"""Extraction switches that decide which rows there are, not what one holds."""


def _channels(normalizer: Normalizer) -> list[dict[str, Any]]:
    from data.cleaning import RANGES
    from data.episodes import UNITS
    from data.schema import CHANNELS, CONTINUOUS

    described = []
    for v, channel in enumerate(CHANNELS):
        entry: dict[str, Any] = {"name": channel.name, "before_first": channel.normal}
        if v in CONTINUOUS:
            place = CONTINUOUS.index(v)
            entry |= {
                "unit": UNITS[channel.name],
                "outlier_and_valid_range": RANGES[channel.name],
                "mean": normalizer.means[place],
                "std": normalizer.stds[place],
            }
        else:
            entry["levels"] = list(channel.levels)
        described.append(entry)
    return described


def _normalizer(steps: dict[str, Any]) -> Normalizer:
    from data.normalise import Normalizer

    numeric = [channel for channel in steps["channels"] if "mean" in channel]
    return Normalizer(
        tuple(channel["mean"] for channel in numeric),
        tuple(channel["std"] for channel in numeric),
        steps["zero_beyond"],
    )


def _verify(folder: Path) -> None:
    manifest = _json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{folder / MANIFEST}: format {manifest.get('format')!r}, but this version reads "
            f"{FORMAT}; export the run again"
        )
    for name in (WEIGHTS, CONFIG, PREPROCESSING):
        digest = manifest["files"].get(name)
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: missing; export the run again")
        if sha256_file(folder / name) != digest:
            raise InputError(
                f"{folder / name} is not the file that {MANIFEST} names; export the run again"
            )


def _refuse_other_features(
    folder: Path, config: dict[str, Any], steps: dict[str, Any], spec: TaskSpec
) -> None:
    from data.schema import FEATURE_NAMES

    if steps["features"] != list(FEATURE_NAMES) or config["labels"] != list(spec.labels):
        raise InputError(
            f"{folder}: its channels or labels are not this version's; predict with the version "
            "that exported it"
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path}: missing, so {path.parent} is no export; `rayfuse export` writes one"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); export the run again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object; export the run again")
    return value
