"""MIMIC-CXR-JPG 2.0.0: which images exist, their tables and their files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from data.files import atomic_path
from data.sources.synthetic import planting
from data.sources.synthetic.images import draw_images, to_jpeg
from data.sources.synthetic.people import HOUR, scatter_ids
from data.tasks import CHEXPERT_LABELS

if TYPE_CHECKING:
    from pathlib import Path

    from data.sources.synthetic.config import HospitalConfig
    from data.sources.synthetic.people import Block
    from data.sources.synthetic.writer import Tables

VIEWS = {"AP": "antero-posterior", "PA": "postero-anterior", "LATERAL": "lateral"}
PREFIX = "mimic-cxr-2.0.0-"


class Plan:
    """The images of one block: stay, time, view and latents; the first of each study is listed."""

    def __init__(self, block: Block, config: HospitalConfig, rng: np.random.Generator) -> None:
        s = len(block.stay)
        acuity = block.acuity[block.stay_admission]
        odds = np.log(config.image_rate / (1 - config.image_rate))
        odds = odds * np.sqrt(1 + config.acuity_on_image**2 / 2.9)
        chance = 1.0 / (1.0 + np.exp(-(odds + config.acuity_on_image * acuity)))
        has = rng.random(s) < chance
        window = np.minimum(block.hours, 48.0)
        stays, hours, views = [], [], []

        def add(which: np.ndarray, low: np.ndarray, high: np.ndarray, view: str) -> None:
            at = np.flatnonzero(which)
            stays.append(at)
            hours.append(rng.uniform(low[at], high[at]))
            views.append(np.full(len(at), view))

        zero = np.zeros(s)
        add(has, zero + 0.5, window * 0.98, "AP")
        add(has & (rng.random(s) < 0.3), zero + 0.5, window * 0.98, "AP")
        add(rng.random(s) < 0.15, zero + 0.5, window * 0.98, "PA")
        add(rng.random(s) < 0.10, zero + 0.5, window * 0.98, "LATERAL")
        late = block.hours > 60.0
        add(late & (rng.random(s) < 0.35), zero + 49.0, np.maximum(block.hours - 1, 50.0), "AP")
        add(rng.random(s) < 0.10, zero - 90.0, zero - 1.0, "AP")
        self.stay = np.concatenate(stays)
        self.view = np.concatenate(views)
        order = np.lexsort((np.concatenate(hours), self.stay))
        hour = np.concatenate(hours)[order]
        self.stay, self.view = self.stay[order], self.view[order]
        self.time = block.intime[self.stay] + (hour * HOUR).astype(np.int64)
        own = rng.integers(0, 2, (len(order), 4)).astype(np.uint8)
        inside = (self.view == "AP") & (hour > 0)
        self.latents = np.where(
            inside[:, None], block.latents[block.stay_admission[self.stay]], own
        ).astype(np.uint8)
        self.in_window = inside & (hour <= 48.0) & (self.time <= block.outtime[self.stay])
        lot = rng.random(len(order))
        self.lost = lot < 0.01  # its row is there, its file is not
        self.unnamed = (lot > 0.99) & ~self.in_window  # no view position
        self.hex = rng.integers(0, 1 << 32, (len(order), 5))

    def dicom_ids(self) -> list[str]:
        """Ids such as 02aa804e-bde0afdd-112c0b34-7bc16630-4e384014."""
        return ["-".join(f"{part:08x}" for part in row) for row in self.hex]


def write_cxr(  # noqa: PLR0913 - one call a block
    tables: Tables,
    block: Block,
    plan: Plan,
    config: HospitalConfig,
    rng: np.random.Generator,
    *,
    root: Path,
    size: int,
    key: tuple[int, int],
    quirks: bool,
) -> np.ndarray:
    """Tables and JPEG files of one block; `key` is the hospital's seed and the block's number.

    Returns:
        P(i1 on | image), P(i2 on | image) of each image: float64 [images, 2].
    """
    n = len(plan.stay)
    subject = block.subject[block.stay_patient[plan.stay]]
    study = scatter_ids(key[1] * 1_024 + np.arange(n), 50_000_000, key[0])
    dicom = plan.dicom_ids()
    grid, belief = draw_images(plan.latents[:, 2:], config, rng)
    for k in range(n):
        outside = tables.subjects is not None and subject[k] not in tables.subjects
        if outside or (quirks and plan.lost[k]):
            continue
        name = f"files/p{str(subject[k])[:2]}/p{subject[k]}/s{study[k]}/{dicom[k]}.jpg"
        with atomic_path(root / name) as path:
            path.write_bytes(to_jpeg(grid[k], size))
    _write_metadata(tables, plan, subject, study, (size, quirks))
    found = planting.findings(plan.latents, config, rng)
    _write_labels(tables, found, (subject, study), rng, quirks=quirks)
    part = np.where(subject % 20 == 0, "test", np.where(subject % 20 == 1, "validate", "train"))
    tables.append(
        f"{PREFIX}split.csv.gz",
        pl.DataFrame(
            {
                "dicom_id": pl.Series(dicom, dtype=pl.String),
                "study_id": study,
                "subject_id": subject,
                "split": part,
            }
        ),
    )
    return belief


def _write_metadata(
    tables: Tables, plan: Plan, subject: np.ndarray, study: np.ndarray, shown: tuple[int, bool]
) -> None:
    """One row an image; `shown` is the images' side and whether some views are blank."""
    size, quirks = shown
    n = len(plan.stay)
    when = (np.datetime64(0, "s") + plan.time).astype("datetime64[s]")
    text = [str(t) for t in when]
    date = [int(t[:10].replace("-", "")) for t in text]
    clock = [f"{int(t[11:].replace(':', ''))}.{531 + k % 400}" for k, t in enumerate(text)]
    blank = plan.unnamed & quirks
    tables.append(
        f"{PREFIX}metadata.csv.gz",
        pl.DataFrame(
            {
                "dicom_id": pl.Series(plan.dicom_ids(), dtype=pl.String),
                "subject_id": subject,
                "study_id": study,
                "PerformedProcedureStepDescription": ["CHEST (PORTABLE AP)"] * n,
                "ViewPosition": [
                    None if b else str(v) for v, b in zip(plan.view, blank, strict=True)
                ],
                "Rows": np.full(n, size),
                "Columns": np.full(n, size),
                "StudyDate": pl.Series(date, dtype=pl.Int64),
                "StudyTime": pl.Series(clock, dtype=pl.String),
                "ProcedureCodeSequence_CodeMeaning": ["CHEST (PORTABLE AP)"] * n,
                "ViewCodeSequence_CodeMeaning": [VIEWS[str(v)] for v in plan.view],
                "PatientOrientationCodeSequence_CodeMeaning": ["Erect"] * n,
            },
            schema_overrides={"ViewPosition": pl.String, "ViewCodeSequence_CodeMeaning": pl.String},
        ),
    )


def _write_labels(
    tables: Tables,
    found: np.ndarray,
    ids: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
    *,
    quirks: bool,
) -> None:
    """The 14 labels of each study: 1, 0, -1 or blank; a few studies have no row."""
    subject, study = ids
    shown = np.where(found == 1, 1.0, rng.choice([np.nan, 0.0], found.shape, p=[0.8, 0.2]))
    shown = np.where((found == 0) & (rng.random(found.shape) < 0.03), -1.0, shown)
    columns = {
        name: pl.Series(shown[:, k], dtype=pl.Float64).fill_nan(None)
        for k, name in enumerate(CHEXPERT_LABELS)
    }
    labelled = pl.Series(~((rng.random(len(study)) < 0.01) & quirks), dtype=pl.Boolean)
    frame = pl.DataFrame({"subject_id": subject, "study_id": study, **columns})
    tables.append(f"{PREFIX}chexpert.csv.gz", frame.filter(labelled))
