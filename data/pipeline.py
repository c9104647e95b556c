"""Ray Data runs the extraction: every subject partition is one row, one task and one shard.

Unfinished work lies in a hidden sibling of the output, `.<out>.<hash>.partial`, named by the
sources and the settings: the raw tables' partitions, the shards, and a record beside each shard
that is written after it. A killed extraction is continued by the same command; the output folder
appears by one rename when everything is there.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from data.admission_stage import ingest_admissions, ingest_meds
from data.code_lists import labelled_spec
from data.errors import InputError
from data.extraction import extract_partition
from data.files import sha256_json, write_json
from data.flow import merge_quarantine
from data.images import ImageCache, prepare_images
from data.manifest import Manifest
from data.opening import open_sources, partitions_of
from data.schema import SCHEMA_VERSION
from data.shards import PartitionRecord, assemble, finish_samples, write_excluded, write_shard
from data.sources.meds import Meds
from data.sources.release import Release
from data.stage import (
    Stage,
    StagedFile,
    ingest,
    load_tables,
    named_full_disk,
    publish,
    work_folder,
    write_partitions,
)
from data.tasks import task_spec

if TYPE_CHECKING:
    from pathlib import Path

    from data.opening import Opened
    from data.switches import ExtractConfig, Sources
    from data.tasks import TaskSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """What a worker needs to extract any partition; plain values, sent once a task."""

    work: Path
    task: str
    config: ExtractConfig
    staged: Stage
    staged_folder: Path
    cxr_files: tuple[StagedFile, ...]
    cxr_folder: Path | None

    @property
    def spec(self) -> TaskSpec:
        """The task with the labels of this extraction."""
        return labelled_spec(task_spec(self.task), self.config.admissions)


def extract(
    sources: Sources, task: str, config: ExtractConfig, out: Path, *, preset: str
) -> Manifest:
    """Extract the samples of a task into `out`.

    Ray is used as it is connected; without a connection Ray starts a local instance.

    Args:
        sources: Folders of raw or staged tables, and of images.
        task: A name of data.tasks.
        config: The data switches.
        out: Folder for shards and manifest; absent, empty, or finished from the same inputs.
        preset: What the manifest calls these switches.

    Raises:
        InputError: A fault of the sources or of `out`, or a cohort that a rule left empty.
    """
    config = _with_absolute_labels(config)
    spec = labelled_spec(task_spec(task), config.admissions)
    out = out.absolute()
    opened = open_sources(_absolute(sources), spec, config)
    partitions = partitions_of(opened, config)
    config = config.model_copy(update={"partitions": partitions})
    described = {
        "schema": SCHEMA_VERSION,
        "code": version("rayfuse"),
        "task": task,
        "sources": opened.hashes,
        "config": config.model_dump(mode="json"),
    }
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _finished(out, described)
    work = work_folder(out, sha256_json(described))
    with named_full_disk(out):
        job = _prepare(opened, spec, config, work)
    records = _run(job, partitions)
    parts = assemble(records, spec, described, job.staged)
    manifest = Manifest(
        preset=preset,
        release=opened.release,
        code_version=described["code"],
        excluded_sha256=write_excluded(work, records),
        **parts,
    )
    if opened.cxr is not None:
        quarantine = merge_quarantine([opened.cxr.quarantine, manifest.quarantine])
        manifest = manifest.model_copy(update={"quarantine": tuple(quarantine)})
    manifest.write(work)
    for scratch in ("tables", "records", "images"):
        shutil.rmtree(work / scratch, ignore_errors=True)
    publish(work, out)
    return manifest


def _absolute(sources: Sources) -> Sources:
    """Workers may run in another folder."""
    folders = {name: path and path.absolute() for name, path in sources}
    return sources.model_copy(update=folders)


def _with_absolute_labels(config: ExtractConfig) -> ExtractConfig:
    """Workers may run in another folder."""
    path = config.admissions.label_file
    if path is None:
        return config
    settings = config.admissions.model_copy(update={"label_file": path.absolute()})
    return config.model_copy(update={"admissions": settings})


def _finished(out: Path, described: dict[str, Any]) -> Manifest:
    """The manifest of an output that is already there, if it is the one asked for."""
    manifest = Manifest.load(out)
    made_from = {
        "schema": manifest.schema_version,
        "code": manifest.code_version,
        "task": manifest.task,
        "sources": manifest.sources,
        "config": manifest.config,
    }
    differing = sorted(name for name, value in described.items() if made_from[name] != value)
    if differing:
        raise InputError(
            f"{out}: holds an extraction with another {', '.join(differing)}; "
            "choose another --out or remove that folder"
        )
    logger.info("%s: already extracted", out)
    return manifest


def _prepare(opened: Opened, spec: TaskSpec, config: ExtractConfig, work: Path) -> _Job:
    """Bring every source into partitions; what an earlier attempt finished is kept."""
    staged_folder = work
    if isinstance(opened.ehr, Meds):
        codes = config.admissions.meds
        staged = ingest_meds(opened.ehr, codes, work, config.partitions)
    elif spec.unit == "admission" and isinstance(opened.ehr, Release):
        staged = ingest_admissions(opened.ehr, opened.notes, work, config.partitions)
    elif spec.unit == "image" or opened.ehr is None:
        staged = Stage(
            release=opened.release,
            fingerprint="",
            items="",
            partitions=config.partitions,
            tables=(),
        )
    elif isinstance(opened.ehr, Stage):
        staged = opened.ehr
        staged_folder = opened.ehr_folder or work
    else:
        staged = ingest(opened.ehr, work, config.partitions)
    cxr_files: tuple[StagedFile, ...] = ()
    if opened.cxr is not None:
        shutil.rmtree(work / "tables" / "cxr", ignore_errors=True)
        target = work / "tables" / "cxr"
        frames = iter([opened.cxr.table])
        cxr_files = tuple(write_partitions(frames, target, work, "cxr", config.partitions))
    return _Job(work, spec.name, config, staged, staged_folder, cxr_files, opened.cxr_folder)


def _run(job: _Job, partitions: int) -> list[PartitionRecord]:
    """All partitions' records, in order; Ray Data runs those that are not there yet."""
    import ray
    import ray.data

    done = {
        number: record
        for number in range(partitions)
        if (record := _load_record(job.work, number)) is not None
    }
    missing = [{"partition": number} for number in range(partitions) if number not in done]
    if done:
        logger.info("continuing: %d of %d partitions are done", len(done), partitions)
    if missing:
        if not ray.is_initialized():
            ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
        rows = ray.data.from_items(missing, override_num_blocks=len(missing))
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        for result in rows.map(partial(_extract_one, job=job)).iter_rows():
            if result["fault"]:
                raise InputError(result["fault"])
            number = int(result["partition"])
            record = _load_record(job.work, number)
            if record is None:
                raise InputError(
                    f"{job.work}: the worker of partition {number} wrote elsewhere; "
                    "--out must be on a disk that all nodes share"
                )
            done[number] = record
            share = f"{len(done)}/{partitions}"
            logger.info("partition %d: %d samples (%s)", number, record.rows, share)
    return [done[number] for number in sorted(done)]


def _extract_one(row: dict[str, Any], job: _Job) -> dict[str, Any]:
    """Extract one partition; a fault of the input is a value, since Ray would retry an error."""
    number = int(row["partition"])
    try:
        with named_full_disk(job.work):
            extract_one(number, job)
    except InputError as error:
        return {"partition": number, "fault": str(error)}
    return {"partition": number, "fault": ""}


def extract_one(number: int, job: _Job) -> PartitionRecord:
    """Extract one partition into its shard and its record, the record last."""
    files = job.staged.files_of(number)
    tables = load_tables(job.staged_folder, files)
    cxr = [file for file in job.cxr_files if file.partition == number]
    tables["cxr"] = load_tables(job.work, cxr)["cxr"]
    spec = job.spec
    result = extract_partition(tables, spec, job.config)
    samples = result.samples
    requests = samples.select("dicom_id", "path").drop_nulls().unique(maintain_order=True).rows()
    prepared = prepare_images(
        requests,
        job.cxr_folder or job.work,
        job.config.image_short_side,
        ImageCache(job.work / "images"),
    )
    finished = finish_samples(samples, prepared.images, spec)
    record = write_shard(job.work, number, finished, spec)
    record = record.model_copy(
        update={
            "flow": (*result.flow, *finished.flow),
            "quarantine": (*result.quarantine, *prepared.quarantine),
            "counters": {**result.counters, **prepared.counters},
            "excluded": {rule: tuple(stays) for rule, stays in result.excluded.items()},
        }
    )
    write_json(_record_path(job.work, number), record.model_dump(mode="json"))
    return record


def _record_path(work: Path, number: int) -> Path:
    return work / "records" / f"part-{number:05d}.json"


def _load_record(work: Path, number: int) -> PartitionRecord | None:
    """The record of a partition whose shard is as it was written; None without."""
    path = _record_path(work, number)
    if not path.is_file():
        return None
    record = PartitionRecord.model_validate_json(path.read_text(encoding="utf-8"))
    return record if record.holds(work) else None
