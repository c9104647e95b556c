"""Batches of 48 x 76 series, with and without 224 px images: our loader against a DataLoader.

    python benchmarks/input.py [--rounds 7] [--processes 2] [--ray] [--out benchmarks/results]

All routes read the same shards in the same run with the same transforms and deliver float32
tensors on the CPU; an epoch of each is timed in turn, round after round, after one epoch that
starts the processes, and the figure is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from data.batches import BatchConfig
from data.collate import images_of
from data.decoding import Recipe
from data.files import sha256_file, write_json
from data.loader import open_stream
from data.manifest import Manifest, ShardFile
from data.normalise import PUBLISHED
from data.reader import ShardReader
from data.schema import CHANNELS, N_CHANNELS, N_FEATURES, SHARD_SCHEMA
from data.series import expand
from data.switches import ExtractConfig
from data.transforms import pixels

BATCH = 48
STEPS = 48
SEED = 0


def _jpeg(rng: np.random.Generator) -> bytes:
    shape = (256, 312)
    coarse = Image.fromarray(rng.integers(20, 236, (9, 11), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC), np.float32)
    grey = np.clip(smooth + rng.normal(0, 6, shape), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def make_shards(folder: Path, rows: int, *, images: bool) -> Manifest:
    """A finished shard folder of `rows` stays of 48 bins, in four shards."""
    rng = np.random.default_rng(SEED)
    start = datetime(2150, 1, 1, tzinfo=UTC).replace(tzinfo=None)
    (folder / "shards").mkdir(parents=True)
    files = []
    for number, part in enumerate(np.array_split(np.arange(rows), 4)):
        records = []
        for row in part.tolist():
            values = np.empty((STEPS, N_CHANNELS), np.float32)
            for v, channel in enumerate(CHANNELS):
                if channel.levels:
                    values[:, v] = rng.integers(len(channel.levels), size=STEPS)
                else:
                    values[:, v] = float(channel.normal) * rng.normal(1, 0.1, STEPS)
            record = dict.fromkeys(SHARD_SCHEMA.names)
            record |= {
                "subject_id": row,
                "stay_id": row,
                "split": "train",
                "prediction_time": start + timedelta(hours=STEPS),
                "ehr": values.ravel(),
                "ehr_observed": (rng.random(values.size) < 0.3).astype(np.uint8),
                "ehr_available_at": start,
                "labels": [float(row % 2)],
            }
            if images:
                record |= {"cxr": _jpeg(rng), "dicom_id": str(row), "cxr_available_at": start}
            records.append(record)
        name = f"shards/part-{number:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(records, schema=SHARD_SCHEMA), folder / name)
        files.append(ShardFile(name=name, rows=len(part), sha256=sha256_file(folder / name)))
    manifest = Manifest(
        task="mortality",
        labels=("label",),
        preset="corrected",
        release="benchmark",
        sources={},
        config=ExtractConfig().model_dump(mode="json"),
        config_hash="",
        code_version="benchmark",
        files=tuple(files),
        splits={"train": rows},
        prevalence={},
        overlap={},
        flow=(),
    )
    manifest.write(folder)
    return manifest


class Items(torch.utils.data.Dataset):
    """One row at a time, as a plain Dataset: the same row access and transforms as ours."""

    def __init__(self, shards: Path, config: BatchConfig, *, images: bool) -> None:
        self.reader = ShardReader(shards, config.cache_dir)
        self.image = config.image
        self.images = images

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, row: int) -> dict[str, object]:
        series = self.reader.series(np.array([row]))
        features = expand(series.values, series.observed)
        PUBLISHED.apply(features)
        item: dict[str, object] = {
            "ehr": torch.from_numpy(features),
            "length": len(features),
            "target": torch.from_numpy(self.reader.labels[row]),
            "cxr_target": torch.from_numpy(self.reader.cxr_labels[row]),
            "row": row,
        }
        if self.images:
            grey = pixels(self.reader.image(row), self.image, (SEED, 0, row))
            item["cxr"] = images_of(torch.from_numpy(grey[None].copy()))[0]
        return item


class TableItems(Items):
    """The same, from the Parquet shards held as one Arrow table in memory."""

    def __init__(self, shards: Path, config: BatchConfig, *, images: bool) -> None:
        super().__init__(shards, config, images=images)
        names = [file.name for file in self.reader.manifest.files]
        self.table = pa.concat_tables([pq.read_table(shards / name) for name in names])

    def __getitem__(self, row: int) -> dict[str, object]:
        values = self.table["ehr"][row].values.to_numpy().reshape(-1, N_CHANNELS)
        observed = self.table["ehr_observed"][row].values.to_numpy().reshape(-1, N_CHANNELS)
        features = expand(values, observed)
        PUBLISHED.apply(features)
        item: dict[str, object] = {
            "ehr": torch.from_numpy(features),
            "length": len(features),
            "target": torch.tensor(self.table["labels"][row].as_py()),
            "cxr_target": torch.zeros(14),
            "row": row,
        }
        if self.images:
            grey = pixels(self.table["cxr"][row].as_py(), self.image, (SEED, 0, row))
            item["cxr"] = images_of(torch.from_numpy(grey[None].copy()))[0]
        return item


class Shares(torch.utils.data.Dataset):
    """Our packer inside a DataLoader: one item is one packed batch."""

    def __init__(self, recipe: Recipe) -> None:
        self.packer = recipe.packer()

    def __getitem__(self, rows: np.ndarray) -> object:
        packed = self.packer.pack(rows, 0, np.zeros(len(rows), bool))
        return (
            torch.from_numpy(packed.ehr),
            torch.from_numpy(packed.grey),
            torch.from_numpy(packed.lengths),
            torch.from_numpy(packed.cxr_index),
            packed,
        )


def _plain(dataset: Items, processes: int):
    order = np.random.default_rng(SEED).permutation(len(dataset)).tolist()
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=BATCH,
        sampler=order,
        num_workers=processes,
        persistent_workers=processes > 0,
    )


def routes(shards: Path, config: BatchConfig, processes: int, *, images: bool) -> dict:
    """Name of each route -> a function that runs one epoch and gives the rows it delivered."""

    def ours(processes: int):
        stream = open_stream(
            shards,
            "train",
            config.model_copy(update={"processes": processes}),
            batch_size=BATCH,
            seed=SEED,
            train=True,
        )

        def run() -> int:
            return sum(len(batch) for batch in stream.epoch(0) if batch is not None)

        return run, stream

    many, stream = ours(processes)
    alone, _ = ours(0)
    plain = _plain(Items(shards, config, images=images), processes)
    table = _plain(TableItems(shards, config, images=images), processes)
    recipe = Recipe(shards, config.cache_dir, config, PUBLISHED, train=True, seed=SEED)
    order = [stream.share(0, step).rows for step in range(stream.steps_per_epoch)]
    packed = torch.utils.data.DataLoader(
        Shares(recipe),
        batch_size=None,
        sampler=order,
        num_workers=processes,
        persistent_workers=True,
    )

    def run_packed() -> int:
        count = 0
        for _ehr, grey, _lengths, _index, rest in packed:
            images_of(grey)
            count += len(rest.rows)
        return count

    return {
        "rayfuse": many,
        "dataloader": lambda: sum(len(batch["row"]) for batch in plain),
        "dataloader_parquet_in_memory": lambda: sum(len(batch["row"]) for batch in table),
        "dataloader_of_packed_batches": run_packed,
        "rayfuse_in_process": alone,
    }


def ray_data(shards: Path, config: BatchConfig, *, images: bool) -> dict[str, float]:
    """The Ray Data iterator on the same files: pack in map_batches, then iterate; one epoch."""
    import ray

    names = [str(path) for path in sorted((shards / "shards").glob("*.parquet"))]

    def pack(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        count = len(columns["labels"])
        values = np.concatenate(columns["ehr"]).reshape(-1, N_CHANNELS).astype(np.float32)
        observed = np.concatenate(columns["ehr_observed"]).reshape(-1, N_CHANNELS)
        features = expand(values, observed)
        PUBLISHED.apply(features)
        out = {"ehr": features.reshape(count, STEPS, N_FEATURES)}
        if images:
            keys = [(SEED, 0, row) for row in range(count)]
            out["grey"] = np.stack(
                [
                    pixels(jpeg, config.image, key)
                    for jpeg, key in zip(columns["cxr"], keys, strict=True)
                ]
            )
        return out

    wanted = ["ehr", "ehr_observed", "labels", *(["cxr"] if images else [])]
    dataset = ray.data.read_parquet(names).select_columns(wanted)
    dataset = dataset.map_batches(pack, batch_size=BATCH)
    start = time.perf_counter()
    first, count = 0.0, 0
    for batch in dataset.iter_torch_batches(batch_size=BATCH):
        if images:
            images_of(batch["grey"])
        first = first or time.perf_counter() - start
        count += len(batch["ehr"])
    seconds = time.perf_counter() - start
    return {
        "rows": count,
        "rows_per_second": round(count / seconds),
        "seconds_to_first_batch": round(first, 2),
        "seconds": round(seconds, 2),
    }


def measure(functions: dict, rows: int, rounds: int) -> dict:
    """Rows a second of each route, its median, and its ratio to the plain DataLoader."""
    for run in functions.values():
        assert run() == rows
    speeds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for number in range(rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            start = time.perf_counter()
            count = functions[name]()
            speeds[name].append(count / (time.perf_counter() - start))
            assert count == rows, (name, count)
    return {
        name: {
            "rows_per_second": [round(value) for value in values],
            "median": round(statistics.median(values)),
            "ratio_to_dataloader": round(
                statistics.median(
                    mine / base for mine, base in zip(values, speeds["dataloader"], strict=True)
                ),
                3,
            ),
        }
        for name, values in speeds.items()
    }


def run_case(folder: Path, rows: int, options: argparse.Namespace, *, images: bool) -> dict:
    make_shards(folder, rows, images=images)
    config = BatchConfig(cache_dir=folder / "cache", normalizer="published")
    functions = routes(folder, config, options.processes, images=images)
    measured = measure(functions, rows, options.rounds)
    ratio = measured["rayfuse"]["ratio_to_dataloader"]
    return {"rows": rows, "images": images, "ratio": ratio, "routes": measured}


def ray_cases(scratch: str, processes: int) -> dict:
    """The Ray Data route of both cases, twice, on a local Ray of `processes` CPUs."""
    from ray_jobs import cluster

    found = {}
    with cluster.connect(num_cpus=processes):
        for name, images in (("series", False), ("series_and_images", True)):
            folder = Path(scratch, name)
            config = BatchConfig(cache_dir=folder / "cache", normalizer="published")
            found[name] = [ray_data(folder, config, images=images) for _ in range(2)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=9600, help="rows of the case without images")
    parser.add_argument("--image-rows", type=int, default=1440)
    parser.add_argument("--ray", action="store_true", help="also the Ray Data iterator")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = [round(value, 2) for value in os.getloadavg()]
    with tempfile.TemporaryDirectory() as scratch:
        cases = {
            name: run_case(Path(scratch, name), rows, options, images=images)
            for name, rows, images in (
                ("series", options.rows, False),
                ("series_and_images", options.image_rows, True),
            )
        }
        result = {
            "what": "rows per second delivered as float32 tensors, batches of 48",
            "baseline": "torch DataLoader, one __getitem__ a row, default collate, same row cache",
            "processes": options.processes,
            "rounds": options.rounds,
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "load_average_before": load,
            "cases": cases,
        }
        write_json(options.out / "input.json", result)
        if options.ray:
            result["ray_data_iterator"] = ray_cases(scratch, options.processes)
            write_json(options.out / "input.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
