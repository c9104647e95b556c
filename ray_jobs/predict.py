"""`rayfuse predict`: an export on new episodes, from plain tables or from shards."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from data.errors import InputError
from data.files import PRIVATE, atomic_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from data.collate import Source
    from data.schema import Batch
    from ray_jobs.export import Exported

EPISODE = "episode_id"
_METADATA = b"rayfuse"

_log = logging.getLogger(__name__)


def run(export: Path, source: Path, out: Path, *, batch_size: int = 64, gpu: bool = False) -> int:
    """Predict every episode of a folder.

    Writes a table (0600) of episode_id and one float32 probability for each label, by its name.

    Args:
        export: Folder of `rayfuse export`; nothing else of the run is read.
        source: Folder of tables (docs/export.md) or of shards; of shards the episode's id is the
            stay_id, for a task of images the dicom_id.
        out: The Parquet file.
        batch_size: Rows at a time.
        gpu: On the first GPU.

    Returns:
        Episodes.

    Raises:
        InputError: The export was altered, a file, row, column, unit or channel is wrong, or there
            is no GPU.
    """
    import torch

    from fusion.tasks import Task
    from fusion.training.predict import predict
    from ray_jobs.export import load

    if gpu and not torch.cuda.is_available():
        raise InputError("--gpu: PyTorch sees no GPU here; leave it out")
    exported = load(export)
    rows, ids = _open(exported, source)
    model = exported.model.to("cuda") if gpu else exported.model
    predicted = predict(
        model,
        _batches(exported, rows, len(ids), batch_size),
        Task(exported.spec),
        config=exported.settings,
    )
    _write(out, ids, predicted.probabilities, exported)
    return len(ids)


def _open(exported: Exported, source: Path) -> tuple[Source, list[str]]:
    from data.episodes import Episodes
    from data.manifest import FILE_NAME
    from data.reader import ShardReader

    if not source.is_dir():
        raise InputError(f"{source}: no such folder; give one of tables or of shards")
    if (source / FILE_NAME).is_file():
        reader = ShardReader(source)
        _refuse_other_shards(exported, reader, source)
        return reader, _keys(reader)
    reads = "cxr" in exported.model.modalities
    episodes = Episodes(source, exported.spec, exported.rules, images=reads)
    if not reads:
        _log.info("the model reads no images; those given are left out")
    return episodes, list(episodes.ids)


def _refuse_other_shards(exported: Exported, reader: Any, source: Path) -> None:
    manifest = reader.manifest
    if manifest.task != exported.spec.name:
        raise InputError(
            f"{source}: shards of the task {manifest.task!r}, but the export is of "
            f"{exported.spec.name!r}; extract shards for that"
        )
    other = [
        f"{name}: {manifest.config.get(name)!r} here, {value!r} in training"
        for name, value in exported.extract.items()
        if manifest.config.get(name) != value
    ]
    if other:
        listed = "\n".join(f"  {line}" for line in other)
        raise InputError(f"{source}: extracted otherwise; extract again with\n{listed}")


def _keys(reader: Any) -> list[str]:
    keys = reader.keys()
    columns = keys["stay_id"].to_pylist(), keys["dicom_id"].to_pylist()
    return [
        str(image if stay is None or reader.manifest.task == "radiology" else stay)
        for stay, image in zip(*columns, strict=True)
    ]


def _batches(exported: Exported, rows: Source, count: int, size: int) -> Iterator[Batch]:
    from data.collate import Packer, to_batch

    packer = Packer(rows, exported.batches, exported.normalizer, train=False, seed=0)
    for first in range(0, count, size):
        chosen = np.arange(first, min(first + size, count))
        yield to_batch(packer.pack(chosen, 0, np.zeros(len(chosen), bool)), rows)


def _write(out: Path, ids: list[str], probabilities: np.ndarray, exported: Exported) -> None:
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {EPISODE: pa.array(ids, pa.string())}
    for label, values in zip(exported.spec.labels, probabilities.T, strict=True):
        columns[label] = pa.array(values, pa.float32())
    made = {"export": exported.digest, "task": exported.spec.name}
    table = pa.table(columns).replace_schema_metadata({_METADATA: json.dumps(made)})
    with atomic_path(out) as temporary:
        # Created private before a byte of a patient's is written.
        temporary.touch(mode=PRIVATE)
        pq.write_table(table, temporary)
        temporary.chmod(PRIVATE)
