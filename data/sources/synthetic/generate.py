"""Write a synthetic hospital, block of patients by block of patients."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data.errors import InputError
from data.files import write_json
from data.sources.marker import mark
from data.sources.synthetic import (
    charting,
    clinical,
    codes,
    labs,
    layout_iii,
    layout_iv,
    notes,
    truth,
)
from data.sources.synthetic.config import HospitalConfig, Release
from data.sources.synthetic.cxr_tables import Plan, write_cxr
from data.sources.synthetic.people import MEAN_HOURS, Block, draw_block
from data.sources.synthetic.planting import PLANTED
from data.sources.synthetic.vitals import beliefs, draw_course
from data.sources.synthetic.writer import Tables

if TYPE_CHECKING:
    from pathlib import Path

    from data.sources.synthetic.vitals import Course

logger = logging.getLogger(__name__)

# One independent random stream a block for each part, so that no part moves another.
_STREAMS = (
    "people",
    "course",
    "charting",
    "quirks",
    "tables",
    "codes",
    "cxr",
    "notes",
    "labs",
    "clinical",
)


@dataclass(frozen=True)
class SyntheticTruth:
    """Where a hospital was written, and how much of it there is.

    Attributes:
        ehr: The MIMIC-IV or MIMIC-III folder.
        cxr: The MIMIC-CXR-JPG folder, None if not asked for.
        notes: The folder of the notes (MIMIC-III: `ehr`), None if not asked for.
        truth: Latents, labels and beliefs, outside every raw folder.
        patients: Patients written.
        rows: Rows of each table, by its path under its folder.
    """

    ehr: Path
    cxr: Path | None
    notes: Path | None
    truth: Path
    patients: int
    rows: dict[str, int]


def generate(  # noqa: PLR0913 - each is a choice of the command line
    out: Path,
    *,
    patients: int,
    seed: int,
    release: Release,
    cxr: bool = True,
    notes: bool = True,
    chart_events_per_stay: int = 600,
    image_size: int = 256,
    quirks: bool = True,
    config: HospitalConfig | None = None,
) -> SyntheticTruth:
    """Write raw tables in a release's own layout, deterministic from the seed.

    A hospital of more patients with the same seed begins with the same patients. Memory is that of
    one block of patients whatever their number.

    Args:
        out: A folder that is absent or empty; the raw folders and `truth` are made in it.
        patients: How many, 1 to 300,000.
        seed: Any whole number from 0.
        release: The layout. MIMIC-III has the real release's capital names and upper-case columns.
        cxr: Also write MIMIC-CXR-JPG. (The real one shares its patients with MIMIC-IV only.)
        notes: Also write discharge summaries.
        chart_events_per_stay: Rows of the chart table for a stay of mean length; what the 17
            variables leave of them is filled with other items. 4,300 is as in the real table.
        image_size: Side of the JPEG files in pixels, at least 64.
        quirks: Malformed values, blank ids, missing files and the like; the latents are the same
            without them.
        config: Parameters of the generative model.

    Raises:
        InputError: `out` is not empty, or an argument is out of its range.
    """
    settings = config or HospitalConfig()
    _check(out, patients, seed, image_size, chart_events_per_stay)
    kind, version = release.rsplit("-", 1)
    three = kind == "mimic-iii"
    ehr_root = out / ("mimiciii" if three else "mimiciv") / version
    cxr_root = out / "mimic-cxr-jpg" / "2.0.0" if cxr else None
    note_root = (ehr_root if three else out / "mimic-iv-note" / "2.2") if notes else None
    for folder in (ehr_root, cxr_root, note_root):
        if folder is not None:
            mark(folder)
    hospital = _Hospital(settings, seed, release, chart_events_per_stay, image_size, quirks)
    with ExitStack() as stack:
        ehr = stack.enter_context(Tables(ehr_root))
        images = stack.enter_context(Tables(cxr_root)) if cxr_root else None
        papers = ehr if three else stack.enter_context(Tables(note_root or out))
        stays = stack.enter_context(truth.TruthWriter(out / "truth"))
        visits = stack.enter_context(truth.TruthWriter(out / "truth", clinical.ADMISSIONS_FILE))
        facts = (stays, visits)
        (layout_iii if three else layout_iv).write_dictionaries(ehr)
        per_block = settings.patients_per_block
        for number in range(-(-patients // per_block)):
            wanted = min(per_block, patients - number * per_block)
            hospital.block(number, wanted, ehr, images, papers if notes else None, facts, cxr_root)
            if number % 25 == 24:
                logger.info(
                    "synthetic hospital: %d of %d patients", number * per_block + wanted, patients
                )
        rows = {**ehr.rows, **(images.rows if images else {}), **papers.rows}
    made = SyntheticTruth(ehr_root, cxr_root, note_root, out / "truth", patients, rows)
    write_json(out / "truth" / "truth.json", _described(made, seed, release, settings))
    return made


def _described(
    made: SyntheticTruth, seed: int, release: Release, config: HospitalConfig
) -> dict[str, Any]:
    return {
        "seed": seed,
        "release": release,
        "patients": made.patients,
        "rows": made.rows,
        "config": config.model_dump(),
        "labels": [{**asdict(label), "table": label.table(config).tolist()} for label in PLANTED],
    }


def _check(out: Path, patients: int, seed: int, image_size: int, chart: int) -> None:
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; name a new folder for the synthetic hospital")
    if not 1 <= patients <= 300_000:
        raise InputError(f"patients is {patients}; choose 1 to 300,000")
    if seed < 0:
        raise InputError(f"seed is {seed}; choose a whole number from 0")
    if image_size < 64:
        raise InputError(f"image_size is {image_size}; choose 64 or more")
    if chart < 0:
        raise InputError(f"chart_events_per_stay is {chart}; choose 0 or more")


@dataclass(frozen=True)
class _Hospital:
    config: HospitalConfig
    seed: int
    release: Release
    chart_events_per_stay: int
    image_size: int
    quirks: bool

    def block(
        self,
        number: int,
        wanted: int,
        ehr: Tables,
        images: Tables | None,
        papers: Tables | None,
        facts: tuple[truth.TruthWriter, truth.TruthWriter],
        cxr_root: Path | None,
    ) -> None:
        """Draw block `number` and write its first `wanted` patients."""
        rng = {
            name: np.random.default_rng([self.seed, number, stream])
            for stream, name in enumerate(_STREAMS)
        }
        block = draw_block(number, self.seed, self.config, rng["people"])
        course = draw_course(block, self.config, rng["course"])
        belief = np.full((len(block.stay), 4), 0.5)
        belief[:, :2] = beliefs(block, course, self.config)
        three = self.release == "mimic-iii-1.4"
        carevue = (rng["tables"].random(len(block.stay)) < 0.5) & three
        chart = self._chart(block, course, carevue, rng["charting"], rng["quirks"])
        told = clinical.draw_clinical(block, self.config, rng["clinical"])
        lab, evidence = labs.lab_rows(
            block, rng["labs"], told.side, self.config, quirks=self.quirks
        )
        output = labs.output_rows(block, carevue, rng["labs"])
        diagnoses = codes.draw_diagnoses(
            block, rng["codes"], told.extra, nine_only=three, quirks=self.quirks
        )
        kept = block.subject[:wanted]
        for tables in (ehr, images, papers):
            if tables is not None:
                tables.subjects = kept
        if three:
            layout_iii.write_people(ehr, block, carevue, rng["tables"], quirks=self.quirks)
            layout_iii.write_events(ehr, block, carevue, chart, lab, output, rng["tables"])
            layout_iii.write_diagnoses(ehr, block, diagnoses)
        else:
            layout_iv.write_people(ehr, block, rng["tables"], self.release, quirks=self.quirks)
            layout_iv.write_events(ehr, block, chart, lab, output, rng["tables"])
            layout_iv.write_diagnoses(ehr, block, diagnoses)
        noted = np.zeros(len(block.hadm), bool)
        if papers is not None:
            write = notes.write_noteevents if three else notes.write_discharge
            noted = write(papers, block, told, rng["notes"], quirks=self.quirks)
        plan = Plan(block, self.config, rng["cxr"])
        shown = np.full(len(block.stay), -1)
        if images is not None and cxr_root is not None:
            seen = write_cxr(
                images,
                block,
                plan,
                self.config,
                rng["cxr"],
                root=cxr_root,
                size=self.image_size,
                key=(self.seed, number),
                quirks=self.quirks,
            )
            usable = np.flatnonzero(plan.in_window & ~(plan.lost & self.quirks))
            shown[plan.stay[usable]] = usable  # in the order of time: the latest stays
            belief[shown >= 0, 2:] = seen[shown[shown >= 0]]
        facts[0].append(block, belief, shown >= 0, self.config, kept)
        after = {
            "notes": clinical.note_beliefs(block, noted),
            "labs": clinical.lab_beliefs(evidence, self.config),
        }
        facts[1].write(clinical.truth_rows(block, diagnoses, after, noted), kept)

    def _chart(
        self,
        block: Block,
        course: Course,
        carevue: np.ndarray,
        rng: np.random.Generator,
        quirk_rng: np.random.Generator,
    ) -> charting.Rows:
        parts = charting.vital_rows(block, course, carevue, rng)
        rows = charting.Rows.join([*parts, *charting.slow_rows(block, course, carevue, rng)])
        signal = np.bincount(rows.stay, minlength=len(block.stay))
        wanted = self.chart_events_per_stay * block.hours / MEAN_HOURS
        filler = np.maximum(np.rint(wanted).astype(np.int64) - signal, 0)
        if filler.sum():
            rows = charting.Rows.join([rows, charting.filler_rows(block, filler, rng)])
        if self.quirks:
            rows = charting.malform(rows, block, self.config, quirk_rng)
        return rows
