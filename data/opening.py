"""The sources of an extraction: found, checked and hashed before anything is read."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data.code_lists import code_lists
from data.errors import InputError
from data.estimate import choose_partitions
from data.files import sha256_json
from data.sources.clinical import admission_specs, discharge_file, open_admissions
from data.sources.marker import SUFFIX
from data.sources.meds import Meds, open_meds
from data.sources.mimic_cxr import find_tables, read_mimic_cxr
from data.sources.notes import NoteFile, find_notes, read_notes
from data.sources.release import Release, open_release, open_table
from data.stage import Stage, event_files, is_staged, load_stage

if TYPE_CHECKING:
    from pathlib import Path

    from data.sources.mimic_cxr import CxrSource
    from data.switches import ExtractConfig, Sources
    from data.tasks import TaskSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """The sources of one extraction, found and checked.

    Attributes:
        ehr: Raw tables, staged ones, a MEDS dataset, or none (images alone).
        ehr_folder: Where they lie.
        cxr: The image tables, or none.
        cxr_folder: Where the images lie.
        hashes: Name of each source -> hash, for the manifest.
        notes: The table of discharge summaries, for tasks of admissions.
    """

    ehr: Release | Stage | Meds | None
    ehr_folder: Path | None
    cxr: CxrSource | None
    cxr_folder: Path | None
    hashes: dict[str, str]
    notes: NoteFile | None = None

    @property
    def release(self) -> str:
        """Of the tables; of the images too where they alone are invented, so that it is seen."""
        images = self.cxr.release if self.cxr is not None else ""
        if self.ehr is None:
            return images
        tables = self.ehr.release if isinstance(self.ehr, Stage) else self.ehr.name
        alone = images.endswith(SUFFIX) and not tables.endswith(SUFFIX)
        return f"{tables}+{images}" if alone else tables


def open_sources(sources: Sources, spec: TaskSpec, config: ExtractConfig) -> Opened:
    """Find and check every source that a task needs.

    Raises:
        InputError: One is missing or has a fault; the message names it and its option.
    """
    if spec.unit == "admission":
        return _open_admissions(sources, spec, config)
    if sources.meds is not None:
        raise InputError(
            f"task {spec.name} is not made of admissions; give MIMIC in place of --meds"
        )
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
    return Opened(ehr, folder, cxr, sources.mimic_cxr, hashes)


def _open_admissions(sources: Sources, spec: TaskSpec, config: ExtractConfig) -> Opened:
    """MEDS, or raw MIMIC tables with their notes."""
    hashes = {"label_file": code_lists(spec, config.admissions).digest}
    if sources.meds is not None:
        if config.admissions.abnormal == "flag":
            raise InputError(
                "MEDS has no flag of abnormal results; set data.extract.admissions.abnormal=range"
            )
        meds = open_meds(sources.meds)
        return Opened(meds, sources.meds, None, None, hashes | {"meds": meds.fingerprint()})
    folder = sources.mimic_iv if sources.mimic_iv is not None else sources.mimic_iii
    if folder is None:
        raise InputError(f"task {spec.name} needs --mimic-iii, --mimic-iv or --meds; give one")
    if is_staged(folder):
        raise InputError(
            f"{folder}: staged for stays, without all labs; give the raw folder for {spec.name}"
        )
    release = open_admissions(open_release(folder))
    family = "mimic_iv" if sources.mimic_iv else "mimic_iii"
    _require_family(folder, release.name, family.replace("_", "-"))
    used = [release.tables[table.table].fingerprint() for table in admission_specs(release)]
    hashes[family] = sha256_json(used)
    notes = None
    if sources.notes is not None:
        notes = discharge_file(sources.notes, release.name)
        hashes["notes"] = open_table(notes.table, notes.path).fingerprint()
    elif config.admissions.require_notes:
        raise InputError(
            f"task {spec.name} reads discharge summaries; give --notes, or set "
            "data.extract.admissions.require_notes=false"
        )
    return Opened(release, folder, None, None, hashes, notes)


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


def partitions_of(opened: Opened, config: ExtractConfig) -> int:
    """The number of subject partitions: as staged, as asked, or from the files' sizes.

    Raises:
        InputError: Another number is asked for than the tables were staged in.
    """
    if isinstance(opened.ehr, Stage):
        if config.partitions not in (0, opened.ehr.partitions):
            raise InputError(
                f"{opened.ehr_folder}: staged in {opened.ehr.partitions} partitions, but "
                f"partitions={config.partitions}; leave that switch out or stage again"
            )
        return opened.ehr.partitions
    if config.partitions:
        return config.partitions
    files = _large_files(opened)
    images = opened.cxr.table.height if opened.cxr is not None else 0
    return choose_partitions(files, images if not files else 0)


def _large_files(opened: Opened) -> dict[str, Path]:
    """The files whose sizes decide on the number of partitions."""
    if isinstance(opened.ehr, Meds):
        return {path.name: path for path in opened.ehr.files}
    files = event_files(opened.ehr) if isinstance(opened.ehr, Release) else {}
    return files | ({opened.notes.table: opened.notes.path} if opened.notes else {})
