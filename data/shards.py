"""Samples of one partition into a shard, and the records of all partitions into a manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from data.config import Config
from data.errors import InputError
from data.files import atomic_path, sha256_file, sha256_json
from data.flow import FlowStep, Quarantined, merge_flows, merge_quarantine
from data.manifest import Manifest, ShardFile
from data.schema import SHARD_SCHEMA
from data.splits import SPLITS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from data.stage import Stage
    from data.tasks import TaskSpec

EXCLUDED = "excluded.parquet"
EXCLUDED_SCHEMA = {"stay_id": pl.Int64(), "rule": pl.String()}
_ROW_GROUP = 1024
KINDS = ("ehr", "cxr", "ehr+cxr", "notes", "labs", "notes+labs")
"""Combinations of modalities that a manifest counts."""
_OF_IMAGE = ("dicom_id", "cxr_available_at", "cxr_labels")


class PartitionRecord(Config):
    """What one partition gave; written after its shard, so that a shard without it is unfinished.

    Sums over `split` are kept per split name.
    """

    name: str
    """The shard, relative to the output; there is no file for a partition without samples."""
    rows: int
    sha256: str
    splits: dict[str, int]
    positives: dict[str, tuple[float, ...]]
    """Sum of each label."""
    overlap: dict[str, dict[str, int]]
    flow: tuple[FlowStep, ...] = ()
    quarantine: tuple[Quarantined, ...] = ()
    counters: dict[str, int] = {}  # noqa: RUF012
    excluded: dict[str, tuple[int, ...]] = {}  # noqa: RUF012
    """Rule -> stay_id of the stays that it removed."""

    def holds(self, folder: Path) -> bool:
        """Whether the shard is there as it was written."""
        path = folder / self.name
        return self.rows == 0 or (path.is_file() and sha256_file(path) == self.sha256)


@dataclass(frozen=True)
class FinishedSamples:
    """Samples with their images.

    Attributes:
        table: SHARD_SCHEMA.
        flow: What unreadable images removed.
    """

    table: pa.Table
    flow: tuple[FlowStep, ...]


def finish_samples(
    samples: pl.DataFrame, images: Mapping[str, bytes], task: TaskSpec
) -> FinishedSamples:
    """Put the image bytes in the place of `path`.

    A stay whose image cannot be read goes on without one; a sample that is an image drops out.

    Args:
        samples: Of data.extraction.
        images: dicom_id -> grey JPEG.
        task: Its unit decides.
    """
    wanted = samples["dicom_id"].is_not_null()
    pixels = pl.Series(
        "cxr",
        [images.get(dicom) if dicom is not None else None for dicom in samples["dicom_id"]],
        dtype=pl.Binary,
    )
    finished = samples.with_columns(pixels)
    readable = pl.col("cxr").is_not_null()
    if task.unit == "image":
        finished = finished.filter(readable)
    else:
        finished = finished.with_columns(
            pl.when(readable).then(pl.col(name)).alias(name) for name in _OF_IMAGE
        )
    step = FlowStep(
        rule="cxr readable",
        unit="images",
        rows_in=int(wanted.sum()),
        rows_out=len(pixels) - pixels.null_count(),
        why="The file is there and can be decoded; others are quarantined.",
    )
    used = "cxr" in task.modalities
    table = finished.select(SHARD_SCHEMA.names).to_arrow().cast(SHARD_SCHEMA)
    return FinishedSamples(table, (step,) if used else ())


def write_shard(
    folder: Path, number: int, samples: FinishedSamples, task: TaskSpec
) -> PartitionRecord:
    """Write one partition's shard; the same samples give the same bytes."""
    table = samples.table
    name = f"shards/part-{number:05d}.parquet"
    sha256 = ""
    if table.num_rows:
        with atomic_path(folder / name) as temporary:
            pq.write_table(table, temporary, compression="zstd", row_group_size=_ROW_GROUP)
        sha256 = sha256_file(folder / name)
    shown = ["split", "ehr", "dicom_id", "notes_available_at", "labs_available_at", "labels"]
    frame = pl.DataFrame(table.select(shown))
    of_split = {name: frame.filter(pl.col("split") == name) for name in SPLITS}
    return PartitionRecord(
        name=name,
        rows=table.num_rows,
        sha256=sha256,
        splits={name: part.height for name, part in of_split.items()},
        positives={
            name: _label_sums(part["labels"], len(task.labels)) for name, part in of_split.items()
        },
        overlap={name: _overlap(part, task) for name, part in of_split.items()},
    )


def _label_sums(labels: pl.Series, width: int) -> tuple[float, ...]:
    if not len(labels):
        return (0.0,) * width
    return tuple(labels.list.to_array(width).to_numpy().sum(axis=0, dtype=float).tolist())


def overlap_kinds(task: TaskSpec) -> tuple[str, ...]:
    """What is counted for a task: a stay's series and image, or an admission's notes and labs."""
    return KINDS[3:] if task.unit == "admission" else KINDS[:3]


def _overlap(part: pl.DataFrame, task: TaskSpec) -> dict[str, int]:
    column = {"cxr": "dicom_id", "notes": "notes_available_at", "labs": "labs_available_at"}
    counts = {}
    for kind in overlap_kinds(task):
        held = [part[column.get(name, name)].is_not_null() for name in kind.split("+")]
        both = held[0]
        for other in held[1:]:
            both = both & other
        counts[kind] = int(both.sum())
    return counts


def write_excluded(folder: Path, records: Sequence[PartitionRecord]) -> str:
    """Write which rule removed which stay beside the manifest; its SHA-256 ("" without a stay)."""
    rows = [
        (stay, rule)
        for record in records
        for rule, stays in record.excluded.items()
        for stay in stays
    ]
    if not rows:
        return ""
    table = pl.DataFrame(sorted(rows), EXCLUDED_SCHEMA, orient="row")
    with atomic_path(folder / EXCLUDED) as temporary:
        table.write_parquet(temporary)
    return sha256_file(folder / EXCLUDED)


def load_excluded(folder: Path, manifest: Manifest) -> pl.DataFrame:
    """stay_id and rule of every stay that a rule removed.

    Raises:
        InputError: The file is missing or altered.
    """
    path = folder / EXCLUDED
    if not manifest.excluded_sha256:
        return pl.DataFrame(schema=EXCLUDED_SCHEMA)
    if not path.is_file() or sha256_file(path) != manifest.excluded_sha256:
        raise InputError(f"{path}: altered or missing since its manifest; extract again")
    return pl.read_parquet(path)


def assemble(
    records: Sequence[PartitionRecord],
    task: TaskSpec,
    described: Mapping[str, Any],
    staged: Stage,
) -> dict[str, Any]:
    """The parts of a manifest that follow from its partitions.

    Args:
        records: All partitions, in order.
        task: Its labels are counted.
        described: sources and config, as hashed.
        staged: What the reading pass counted.

    Raises:
        InputError: No sample is left; the message names the rule that removed the last ones.
    """
    flow = merge_flows([_read_steps(staged), *(record.flow for record in records)])
    if not any(record.rows for record in records):
        raise InputError(_why_empty(flow))
    splits = {name: sum(record.splits[name] for record in records) for name in SPLITS}
    counters: dict[str, int] = {}
    for table in staged.tables:
        counters.update(table.repairs)
    for record in records:
        for counter, amount in record.counters.items():
            counters[counter] = counters.get(counter, 0) + amount
    return {
        "task": task.name,
        "labels": task.labels,
        "sources": described["sources"],
        "config": described["config"],
        "config_hash": sha256_json(described["config"]),
        "files": tuple(
            ShardFile(name=record.name, rows=record.rows, sha256=record.sha256)
            for record in records
            if record.rows
        ),
        "splits": splits,
        "prevalence": {
            name: tuple(
                total / splits[name]
                for total in map(sum, zip(*(r.positives[name] for r in records), strict=True))
            )
            for name in SPLITS
            if splits[name]
        },
        "overlap": {
            name: {
                kind: sum(record.overlap[name][kind] for record in records)
                for kind in overlap_kinds(task)
            }
            for name in SPLITS
        },
        "flow": tuple(flow),
        "quarantine": tuple(merge_quarantine(record.quarantine for record in records)),
        "counters": counters,
    }


def _read_steps(staged: Stage) -> list[FlowStep]:
    return [
        FlowStep(
            rule=f"{table.table} read",
            unit="rows",
            rows_in=table.rows_read,
            rows_out=table.rows_kept,
            why="Event tables: items of the 17 variables; subjects with an ICU stay.",
        )
        for table in staged.tables
    ]


def _why_empty(flow: Sequence[FlowStep]) -> str:
    for step in flow:
        if step.rows_in and not step.rows_out and step.unit in ("stays", "images", "admissions"):
            return (
                f"empty cohort: the rule {step.rule!r} left none of {step.rows_in} {step.unit} "
                f"({step.why}); change its switch or check the sources"
            )
    return "empty cohort: the sources hold no ICU stay and no image; check the folders given"


def missing_classes(manifest: Manifest) -> list[str]:
    """Labels that have only one class in a split, or splits without rows; one line each.

    A description warns of them; training too, and it refuses some (`refuse_unlearnable`).
    """
    found = [f"split {name} has no rows" for name, rows in manifest.splits.items() if not rows]
    for split, shares in manifest.prevalence.items():
        for label, share in zip(manifest.labels, shares, strict=True):
            if share in (0.0, 1.0):
                what = "no positive" if share == 0.0 else "no negative"
                found.append(f"split {split} has {what} row of {label!r}")
    return found


def refuse_unlearnable(manifest: Manifest) -> None:
    """Refuse shards to train on, or to choose the best epoch by, in which no label has two classes.

    Raises:
        InputError: Naming the split.
    """
    for split in ("train", "val"):
        shares = manifest.prevalence.get(split, ())
        if all(share in (0.0, 1.0) for share in shares):
            why = "every label has one class only" if shares else "there is no row"
            use = "learn from" if split == "train" else "choose the best epoch by"
            raise InputError(
                f"split {split}: {why}, so there is nothing to {use}; extract more patients or "
                "give other lists in data.extract.split"
            )
