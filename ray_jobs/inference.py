"""A trained run on a split's rows: as they are, and with every X-ray withheld."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from data.errors import InputError
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from data.loader import BatchLoader
    from data.manifest import Manifest
    from data.schema import Batch
    from fusion.model import FusionModel
    from fusion.training.predict import Predictions
    from ray_jobs.config import RunConfig


@dataclass(frozen=True)
class Trained:
    """A run's config, its best weights in the model, and what their meta.json says."""

    config: RunConfig
    model: FusionModel
    meta: dict[str, Any]


def load_config(run_folder: Path) -> RunConfig:
    """The resolved config that a run folder holds.

    Raises:
        InputError: There is none, so the folder is no run.
    """
    from ray_jobs.config import from_dump

    path = RunFolder(run_folder).config
    try:
        return from_dump(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(
            f"{path}: missing, so {run_folder} is no run folder; train first"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: not the config of a run ({error}); train again") from None


def load(run_folder: Path) -> Trained:
    """Build a run's model and fill in its best weights, on the device the config asks for.

    Raises:
        InputError: The run has no config or no best weights, or they do not fit the model.
    """
    import torch

    from fusion import registry
    from fusion.training.checkpoint import read_weights
    from fusion.training.references import fill
    from ray_jobs.predicted import spec_of

    config = load_config(run_folder)
    weights, meta = read_weights(RunFolder(run_folder).best)
    model = registry.get(config.model.name)(config.model, spec_of(config))  # type: ignore[attr-defined]
    try:
        fill(model, weights, meta)
    except InputError as error:
        raise InputError(f"{RunFolder(run_folder).best}: {error}") from None
    if config.scaling.use_gpu and torch.cuda.is_available():
        model = model.to("cuda")
    return Trained(config, model, meta)


def open_split(trained: Trained, split: str) -> BatchLoader:
    """The batches of every row of a split, in order.

    Raises:
        InputError: The shards are not those the run was trained on, the split has no rows, or the
            run's store of kept vectors lacks some of its texts.
    """
    from data.loader import open_stream
    from ray_jobs.texts import refuse_missing

    config = trained.config
    refuse_missing(config, [split])
    stream = open_stream(
        config.data.shards,
        split,
        config.data.batches,
        batch_size=config.train.batch_size,
        seed=config.seed,
        train=False,
        rows="partial",
    )
    try:
        check_learnt_on(config, trained.meta, stream.reader.manifest)
    except InputError:
        stream.close()
        raise
    return stream


def check_learnt_on(config: RunConfig, meta: Mapping[str, Any], manifest: Manifest) -> None:
    """Refuse shards that a run was not trained on.

    Args:
        config: The run's.
        meta: Of its best weights.
        manifest: Of the shards.

    Raises:
        InputError: They are others.
    """
    learnt_on = meta.get("lineage", {}).get("manifest")
    if learnt_on not in (None, manifest.digest):
        raise InputError(
            f"{config.data.shards}: not the shards that {config.name} was trained on (manifest "
            f"{manifest.digest[:12]}, then {learnt_on[:12]}); put those back, or train again under "
            "another name"
        )


def predict(
    trained: Trained, stream: BatchLoader, *, withhold: bool = False, features: bool = False
) -> Predictions:
    """Predictions in the order of the rows.

    Args:
        trained: The run.
        stream: Its rows.
        withhold: Take the image from every row first. In evaluation a row's prediction does not
            depend on its neighbours, so mixing rows of both ways withholds any share of images.
        features: Keep the model's named representations.
    """
    from fusion.tasks import Task
    from fusion.training.predict import predict as run_model
    from ray_jobs.predicted import spec_of

    batches: Iterator[Batch | None] = stream.epoch(0)
    if withhold:
        batches = (batch and without_images(batch) for batch in batches)
    return run_model(
        trained.model,
        batches,
        Task(spec_of(trained.config)),
        config=trained.config.train,
        features=_feature_names(trained) if features else (),
    ).sorted()


def without_images(batch: Batch) -> Batch:
    """The batch as the loader gives it where no row has an image."""
    import torch

    return batch.without("cxr", torch.ones(len(batch), dtype=torch.bool))


def withholding_order(rows: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """[N] in [0, 1): a row's place in the order in which images are withheld.

    It depends on (seed, row) alone, so a larger share withholds all that a smaller one does, and
    two models on the same rows lose the same images.
    """
    return np.array([np.random.default_rng([seed, int(row)]).random() for row in rows])


def _feature_names(trained: Trained) -> tuple[str, ...]:
    """What the model names in `Output.features`, logits of other heads apart."""
    import torch

    from fusion.training.objective import placeholder
    from ray_jobs.predicted import spec_of

    config, device = trained.config, next(trained.model.parameters()).device
    size = config.data.batches.image.size
    batch = placeholder(spec_of(config), (3, size, size))
    trained.model.eval()
    with torch.no_grad():
        named = trained.model(batch.to(device)).features
    return tuple(name for name in named if not name.endswith("_logits"))
