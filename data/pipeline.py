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

from data.errors import InputError
from data.estimate import choose_partitions
from data.extraction import extract_partition
from data.files import sha256_json, write_json
from data.flow import merge_quarantine
from data.images import ImageCache, prepare_images
from data.manifest import Manifest
from data.schema import SCHEMA_VERSION
from data.shards import PartitionRecord, assemble, finish_samples, write_excluded, write_shard
from data.sources.marker import SUFFIX
from data.sources.mimic_cxr import find_tables, read_mimic_cxr
from data.sources.notes import find_notes, read_notes
from data.sources.release import open_release, open_table
from data.stage import (
    Stage,
    StagedFile,
    event_files,
    ingest,
    is_staged,
    load_stage,
    load_tables,
    named_full_disk,
    publish,
    work_folder,
    write_partitions,
)
from data.tasks import task_spec

if TYPE_CHECKING:
    from pathlib import Path

    from data.sources.mimic_cxr import CxrSource
    from data.sources.release import Release
    from data.switches import ExtractConfig, Sources
    from data.tasks import TaskSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Opened:
    """The sources of one extraction, found and checked.

    Attributes:
        ehr: Raw tables, staged ones, or none (images alone).
        ehr_folder: Where they lie.
        cxr: The image tables, or none.
        cxr_folder: Where the images lie.
        hashes: Name of each source -> hash, for the manifest.
    """

    ehr: Release | Stage | None
    ehr_folder: Path | None
    cxr: CxrSource | None
    cxr_folder: Path | None
    hashes: dict[str, str]

    @property
    def release(self) -> str:
        """Of the tables; of the images too where they alone are invented, so that it is seen."""
        images = self.cxr.release if self.cxr is not None else ""
        if self.ehr is None:
            return images
        tables = self.ehr.release if isinstance(self.ehr, Stage) else self.ehr.name
        alone = images.endswith(SUFFIX) and not tables.endswith(SUFFIX)
        return f"{tables}+{images}" if alone else tables


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
    spec = task_spec(task)
    out = out.absolute()
    opened = _open(_absolute(sources), spec)
    partitions = _partitions(opened, config)
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


def _open(sources: Sources, spec: TaskSpec) -> _Opened:
    folder = sources.mimic_iv if sources.mimic_iv is not None else sources.mimic_iii
    wants_images = "cxr" in spec.modalities and sources.mimic_cxr is not None
    if spec.unit == "stay" and folder is None:
        raise InputError(f"task {spec.name} needs --mimic-iv or --mimic-iii; give one of them")
    if spec.unit == "image" and not wants_images:
        raise InputError(f"task {spec.name} is made of images; give --mimic-cxr")
    if sources.notes is not None:
        _check_notes(sources.notes, spec)
    hashes: dict[str, str] = {}
    ehr = None
    if folder is not None:
        ehr = load_stage(folder) if is_staged(folder) else open_release(folder)
        family = ehr.release if isinstance(ehr, Stage) else ehr.name
        _require_family(folder, family, "mimic-iv" if sources.mimic_iv else "mimic-iii")
        hashes["mimic_iv" if sources.mimic_iv else "mimic_iii"] = ehr.fingerprint
    cxr = None
    if wants_images and sources.mimic_cxr is not None:
        _, tables = find_tables(sources.mimic_cxr)
        prints = [open_table(name, path).fingerprint() for name, path in sorted(tables.items())]
        hashes["mimic_cxr"] = sha256_json(prints)
        cxr = read_mimic_cxr(sources.mimic_cxr)
    return _Opened(ehr, folder, cxr, sources.mimic_cxr, hashes)


def _check_notes(folder: Path, spec: TaskSpec) -> None:
    """Find the tables of notes and read the start of each: no task takes anything from them yet."""
    found = find_notes(folder)
    for file in found:
        next(read_notes(file), None)
    tables = ", ".join(file.table for file in found)
    logger.warning("notes: %s found and readable, but task %s uses none of it", tables, spec.name)


def _require_family(folder: Path, release: str, family: str) -> None:
    if not release.startswith(f"{family}-"):
        right = "--mimic-iii" if family == "mimic-iv" else "--mimic-iv"
        raise InputError(f"{folder}: holds {release}; give it as {right}")


def _partitions(opened: _Opened, config: ExtractConfig) -> int:
    if isinstance(opened.ehr, Stage):
        if config.partitions not in (0, opened.ehr.partitions):
            raise InputError(
                f"{opened.ehr_folder}: staged in {opened.ehr.partitions} partitions, but "
                f"partitions={config.partitions}; leave that switch out or stage again"
            )
        return opened.ehr.partitions
    if config.partitions:
        return config.partitions
    files = event_files(opened.ehr) if opened.ehr is not None else {}
    images = opened.cxr.table.height if opened.cxr is not None else 0
    return choose_partitions(files, images if not files else 0)


def _prepare(opened: _Opened, spec: TaskSpec, config: ExtractConfig, work: Path) -> _Job:
    """Bring every source into partitions; what an earlier attempt finished is kept."""
    staged_folder = work
    if spec.unit == "image" or opened.ehr is None:
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
    result = extract_partition(tables, task_spec(job.task), job.config)
    samples = result.samples
    requests = samples.select("dicom_id", "path").drop_nulls().unique(maintain_order=True).rows()
    prepared = prepare_images(
        requests,
        job.cxr_folder or job.work,
        job.config.image_short_side,
        ImageCache(job.work / "images"),
    )
    finished = finish_samples(samples, prepared.images, task_spec(job.task))
    record = write_shard(job.work, number, finished, task_spec(job.task))
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
