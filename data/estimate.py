"""What an extraction will cost, from the sizes of its files before any of them is read."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Final

from data.config import Config

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from data.switches import Sources

INFLATION: Final = {".gz": 10.0, ".csv": 1.0, ".parquet": 8.0}
"""Bytes of CSV for a byte of each format: synthetic tables give 5 to 7, repetitive ones more."""
PARTITION_CSV_BYTES: Final = 640 << 20
"""CSV bytes of events for one partition: about a million rows of the 17 variables."""
MB_PER_SECOND: Final = 90.0
"""CSV megabytes that one core inflates, parses and extracts in a second (benchmark JSON)."""
KEPT_SHARE: Final = 0.02
"""Staged bytes for a byte of CSV."""
SHARD_SHARE: Final = 0.03
"""Shard bytes for a byte of CSV, images apart."""
BASE_MEMORY: Final = int(3.3e9)
"""Bytes that the driver and an idle local Ray take, summed over processes as the benchmark does."""
WORKER_MEMORY: Final = int(0.5e9)
"""Bytes that one partition takes while it is extracted."""
IMAGE_BYTES: Final = 15_000
"""One grey JPEG with a short side of 256."""
STAY_BYTES: Final = 130
"""One row of icustays."""
IMAGES_PER_STAY: Final = 0.25
"""Stays with an image in their window, generously (19 % in MIMIC-IV)."""
SPLIT_ROW_BYTES: Final = 70
"""One row of MIMIC-CXR-JPG's split table, which lists every image."""
IMAGES_PER_SECOND: Final = 50.0
"""Full-size radiographs that one core decodes and shrinks in a second."""


class Estimate(Config):
    """What an extraction needs; all sizes in bytes."""

    release: str
    csv_bytes: int
    """The raw event tables, inflated."""
    images: int
    """Upper bound of the images that are read; 0 where unknown or none."""
    partitions: int
    workers: int
    """CPU cores that the time is given for."""
    memory: int
    scratch: int
    """Disk beside --out while it runs."""
    output: int
    seconds: float
    free_disk: int
    free_memory: int

    @property
    def lacks(self) -> list[str]:
        """What this machine has too little of, in words."""
        wanted = self.scratch + self.output
        found = []
        if wanted > self.free_disk:
            found.append(f"disk: {_size(wanted)} needed, {_size(self.free_disk)} free")
        if self.memory > self.free_memory:
            found.append(f"memory: {_size(self.memory)} needed, {_size(self.free_memory)} free")
        return found

    def text(self) -> str:
        """A few lines for a terminal."""
        lines = [
            f"release     {self.release}",
            f"events      {_size(self.csv_bytes)} of CSV once inflated (estimated)",
            f"images      at most {self.images}" if self.images else "images      none",
            f"partitions  {self.partitions}",
            f"disk        {_size(self.scratch)} while it runs, {_size(self.output)} at the end",
            f"memory      {_size(self.memory)} at {self.workers} workers",
            f"time        about {_duration(self.seconds)} on {self.workers} cores",
        ]
        return "\n".join(lines + [f"NOT ENOUGH  {lack}" for lack in self.lacks])


def plan_extraction(sources: Sources, task: str, out: Path) -> Estimate:
    """Predict what an extraction needs; of the tables only headers and sizes are read.

    Raises:
        InputError: A table or column is missing.
    """
    from data.sources.mimic_cxr import find_tables
    from data.sources.release import open_release
    from data.stage import event_files, is_staged, load_stage
    from data.tasks import task_spec

    spec = task_spec(task)
    folder = sources.mimic_iv or sources.mimic_iii
    release, files, images = "", {}, 0
    if folder is not None and is_staged(folder):
        staged = load_stage(folder)
        release = f"{staged.release}, staged"
        paths = [folder / file.name for table in staged.tables for file in table.files]
        files = {f"{number}": path for number, path in enumerate(paths)}
        known = {"partitions": staged.partitions}
        return estimate(files, release, out=out).model_copy(update=known)
    if folder is not None:
        opened = open_release(folder)
        release, files = opened.name, event_files(opened)
        if sources.mimic_cxr is not None:
            stays = csv_size(opened.tables["icustays"].path) / STAY_BYTES
            images = int(stays * IMAGES_PER_STAY)
    if spec.unit == "image" and sources.mimic_cxr is not None:
        name, tables = find_tables(sources.mimic_cxr)
        release, files = release or name, {}
        images = int(csv_size(tables["split"]) / SPLIT_ROW_BYTES)
    return estimate(files, release, out=out, images=images)


def estimate(
    event_files: Mapping[str, Path], release: str, *, out: Path, images: int = 0
) -> Estimate:
    """Predict disk, memory and time.

    The constants of this module come from benchmarks/results/extraction.json and are rounded to
    the careful side; a slow disk or network adds to the time.

    Args:
        event_files: The event tables' files by name.
        release: Their release.
        out: Where the shards will go; its disk is looked at.
        images: Number of images that may be read.
    """
    import psutil

    inflated = csv_bytes(event_files.values())
    partitions = choose_partitions(event_files, images)
    workers = os.cpu_count() or 1
    images_seconds = images / IMAGES_PER_SECOND / workers
    existing = next(place for place in (out, *out.absolute().parents) if place.exists())
    return Estimate(
        release=release,
        csv_bytes=inflated,
        images=images,
        partitions=partitions,
        workers=workers,
        memory=BASE_MEMORY + WORKER_MEMORY * min(workers, partitions),
        scratch=int(inflated * KEPT_SHARE) + images * IMAGE_BYTES,
        output=int(inflated * SHARD_SHARE) + images * IMAGE_BYTES,
        seconds=inflated / 1e6 / MB_PER_SECOND / min(workers, 2) + images_seconds,
        free_disk=shutil.disk_usage(existing).free,
        free_memory=psutil.virtual_memory().available,
    )


def csv_bytes(paths: Iterable[Path]) -> int:
    """Bytes of tables as CSV, from the sizes of their files."""
    return sum(csv_size(path) for path in paths)


def csv_size(path: Path) -> int:
    """Bytes of one table as CSV."""
    return int(path.stat().st_size * INFLATION.get(path.suffix.lower(), 1.0))


def choose_partitions(event_files: Mapping[str, Path], images: int = 0) -> int:
    """Partitions of about a million needed rows, or of five thousand images."""
    events = csv_bytes(event_files.values())
    return max(1, -(-events // PARTITION_CSV_BYTES), -(-images // 5000))


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
