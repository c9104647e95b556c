"""Fixtures of all tests: one Ray instance a session, synthetic shards."""

from __future__ import annotations

import io
import os
import tempfile
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.files import sha256_file
from data.manifest import Manifest, ShardFile
from data.schema import CHANNELS, N_CHANNELS, SHARD_SCHEMA
from data.switches import ExtractConfig
from data.tasks import CHEXPERT_LABELS, TaskSpec, task_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def pytest_configure(config: pytest.Config) -> None:
    """Tests see neither a home folder nor a cluster of the user's."""
    home = tempfile.TemporaryDirectory(prefix="home-")
    config.add_cleanup(home.cleanup)
    os.environ["HOME"] = home.name
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]
    # Ray's workers yield to everything else: on a busy machine a test of theirs would not end.
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"})


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """The session's one local Ray instance, as `rayfuse` starts it."""
    from ray_jobs import cluster

    with cluster.connect(num_cpus=4):
        yield


def _channel_values(rng: np.random.Generator, steps: int) -> np.ndarray:
    """[T, 17] as an extraction stores them: level indices, and numbers near each normal value."""
    values = np.empty((steps, N_CHANNELS), np.float32)
    for v, channel in enumerate(CHANNELS):
        if channel.levels:
            values[:, v] = rng.integers(len(channel.levels), size=steps)
        else:
            values[:, v] = float(channel.normal) * rng.normal(1.0, 0.1, steps)
    return values


def _grey_jpeg(rng: np.random.Generator, short_side: int) -> bytes:
    """A grey JPEG of smooth blobs and grain whose longer side differs from image to image."""
    longer = short_side + int(rng.integers(short_side // 3 + 1))
    shape = (short_side, longer) if rng.random() < 0.5 else (longer, short_side)
    coarse = Image.fromarray(rng.integers(40, 216, (5, 4), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC), np.float32)
    pixels = np.clip(smooth + rng.normal(0, 12, shape), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _shard_row(rng: np.random.Generator, index: int, spec: TaskSpec, settings: dict) -> dict:
    """One row of the shard schema; two rows share a patient."""
    start = datetime(2150, 1, 1) + timedelta(days=index)  # noqa: DTZ001
    hours = spec.window_hours or float(settings["hours"])
    by_image = spec.unit == "image"
    draw = index // 2 % 10
    row = dict.fromkeys(SHARD_SCHEMA.names)
    row |= {
        "subject_id": 10_000 + index // 2,
        "split": "train" if draw < 6 else "val" if draw < 8 else "test",
        "sex": "FM"[index // 2 % 2],
        "age": float(20 + index // 2 % 70),
        "labels": (rng.random(len(spec.labels)) < 0.4).astype(np.float32),
    }
    if not by_image:
        steps = int(hours) if spec.window_hours else int(rng.integers(1, int(hours) + 1))
        row |= {
            "hadm_id": 20_000 + index,
            "stay_id": 30_000 + index,
            "prediction_time": start + timedelta(hours=hours),
            "ehr": _channel_values(rng, steps).ravel(),
            "ehr_observed": (rng.random(steps * N_CHANNELS) < 0.3).astype(np.uint8),
            "ehr_available_at": start + timedelta(hours=hours - 1),
        }
    if by_image or rng.random() < settings["cxr_share"]:
        row |= {
            "cxr": _grey_jpeg(rng, settings["image_size"]),
            "dicom_id": f"dicom-{index:05d}",
            "cxr_available_at": start + timedelta(hours=hours / 2),
            "cxr_labels": (rng.random(len(CHEXPERT_LABELS)) < 0.2).astype(np.float32),
        }
    return row


def _shard_manifest(
    spec: TaskSpec, rows: list[dict], files: list[ShardFile], seed: int
) -> Manifest:
    splits: dict[str, list[dict]] = {
        name: [row for row in rows if row["split"] == name] for name in ("train", "val", "test")
    }
    width = len(spec.labels)
    return Manifest(
        task=spec.name,
        labels=spec.labels,
        preset="corrected",
        release="mimic-iv-2.2",
        sources={"mimic_iv": f"fixture-{seed}"},
        config=ExtractConfig().model_dump(mode="json"),
        config_hash="0" * 64,
        code_version="test",
        files=tuple(files),
        splits={name: len(members) for name, members in splits.items()},
        prevalence={
            name: tuple(np.mean([row["labels"][:width] for row in members], axis=0).tolist())
            for name, members in splits.items()
            if members
        },
        overlap={
            name: {
                "ehr": sum(row["ehr"] is not None for row in members),
                "cxr": sum(row["cxr"] is not None for row in members),
                "ehr+cxr": sum(
                    row["ehr"] is not None and row["cxr"] is not None for row in members
                ),
            }
            for name, members in splits.items()
        },
        flow=(),
    )


@pytest.fixture(scope="session")
def make_shards() -> Callable[..., Manifest]:
    """A function that writes a finished shard folder with real JPEG bytes and its manifest.

    `make_shards(folder, rows=40, task="mortality", seed=0, image_size=256, cxr_share=0.5,
    shards=2, hours=48, labels=None, edit=None)`: six patients in ten train, two validate, two test,
    two rows each; `hours` bounds the length of whole-stay series; `labels` are in place of the
    task's, as a hospital's own file names them; `edit(rows)` may change the rows (dicts of the
    shard schema) before they are written.
    """

    def make(
        folder: Path,
        *,
        rows: int = 40,
        task: str = "mortality",
        seed: int = 0,
        image_size: int = 256,
        cxr_share: float = 0.5,
        shards: int = 2,
        hours: int = 48,
        labels: tuple[str, ...] | None = None,
        edit: Callable[[list[dict]], None] | None = None,
    ) -> Manifest:
        spec = task_spec(task)
        spec = replace(spec, labels=labels or spec.labels)
        rng = np.random.default_rng(seed)
        settings = {"image_size": image_size, "cxr_share": cxr_share, "hours": hours}
        table_rows = [_shard_row(rng, index, spec, settings) for index in range(rows)]
        if edit is not None:
            edit(table_rows)
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        patients_per_shard = -(-rows // (2 * shards))
        files = []
        for number, first in enumerate(range(0, rows, 2 * patients_per_shard)):
            part = table_rows[first : first + 2 * patients_per_shard]
            name = f"shards/part-{number:05d}.parquet"
            pq.write_table(pa.Table.from_pylist(part, schema=SHARD_SCHEMA), folder / name)
            files.append(ShardFile(name=name, rows=len(part), sha256=sha256_file(folder / name)))
        manifest = _shard_manifest(spec, table_rows, files, seed)
        manifest.write(folder)
        return manifest

    return make
