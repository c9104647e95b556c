"""Discharge summaries with the four sections of an admission, de-identified as each release is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from data.sources.synthetic.clinical import medication_change, present_illness
from data.sources.synthetic.writer import times
from data.tasks import PHENOTYPES

if TYPE_CHECKING:
    from data.sources.synthetic.clinical import Clinical
    from data.sources.synthetic.people import Block
    from data.sources.synthetic.writer import Tables

COMPLAINTS = ("Shortness of breath", "Chest pain", "Altered mental status", "Fever", "Weakness")
HISTORY = ("Gout", "Appendectomy", "Migraine", "Osteoarthritis", "Hypothyroidism")
DRUGS = (
    "Lisinopril 10 mg PO DAILY",
    "Metoprolol 25 mg PO BID",
    "Aspirin 81 mg PO DAILY",
    "Furosemide 40 mg PO DAILY",
    "Atorvastatin 20 mg PO QHS",
    "Insulin sliding scale",
)


def texts_of(
    block: Block, clinical: Clinical, rng: np.random.Generator, *, brackets: bool
) -> list[str]:
    """One text an admission.

    Only sentences of `clinical` say anything of the labels, apart from the discharge diagnoses,
    which name them: whoever reads beyond the sections of the admission reads the answer.
    """
    name = "[**Known lastname 1234**]" if brackets else "___"
    date = "[**2151-7-16**]" if brackets else "___"
    place = "[**Hospital1 18**]" if brackets else "___"
    out = []
    for admission in range(len(block.hadm)):
        present = np.flatnonzero(block.labels[admission, : len(PHENOTYPES)])
        latents = block.latents[admission]
        told = present_illness(latents, bool(clinical.noise[admission]), rng)
        named = "\n".join(f"- {PHENOTYPES[k][0]}" for k in present) or "None"
        history = [line for line in HISTORY if rng.random() < 0.3]
        chosen = rng.choice(len(DRUGS), size=int(rng.integers(1, 5)), replace=False)
        listed = "\n".join(f"{k + 1}. {DRUGS[d]}" for k, d in enumerate(chosen))
        past = "\n".join(f"- {line}" for line in history) or "None"
        sex = "M" if block.male[block.adm_patient[admission]] else "F"
        complaint = COMPLAINTS[int(rng.integers(len(COMPLAINTS)))]
        out.append(
            f"Name:  {name}    Unit No:  ___\n\nAdmission Date:  {date}\nSex:  {sex}\n\n"
            f"Chief Complaint:\n{complaint}\n\n"
            f"History of Present Illness:\n{name} presented to {place} on {date} with "
            f"{complaint.lower()}, and was admitted to the intensive care unit. {told}\n\n"
            f"Past Medical History:\n{past}\n\n"
            f"Medications on Admission:\n{listed}\n{medication_change(latents)}\n\n"
            f"Discharge Diagnosis:\n{named}\n\n"
            f"Discharge Disposition:\n{'Expired' if block.died[admission] else 'Home'}\n"
        )
    return out


def write_discharge(
    tables: Tables, block: Block, clinical: Clinical, rng: np.random.Generator, *, quirks: bool
) -> np.ndarray:
    """note/discharge of one block (MIMIC-IV-Note); with quirks one admission in ten has none.

    Returns:
        bool [A]: which admissions have a readable note.
    """
    texts = texts_of(block, clinical, rng, brackets=False)
    kept = np.flatnonzero((rng.random(len(texts)) > 0.1) | (not quirks))
    subject = block.subject[block.adm_patient[kept]]
    tables.append(
        "note/discharge.csv.gz",
        pl.DataFrame(
            {
                "note_id": [f"{s}-DS-{k % 90 + 1}" for s, k in zip(subject, kept, strict=True)],
                "subject_id": subject,
                "hadm_id": block.hadm[kept],
                "note_type": ["DS"] * len(kept),
                "note_seq": kept % 90 + 1,
                "charttime": times(block.discharge[kept] // 86_400 * 86_400),
                "storetime": times(block.discharge[kept] + 86_400),
                "text": [texts[k] for k in kept],
            },
            schema_overrides={"note_id": pl.String, "note_type": pl.String, "text": pl.String},
        ),
    )
    return np.isin(np.arange(len(texts)), kept)


def write_noteevents(
    tables: Tables, block: Block, clinical: Clinical, rng: np.random.Generator, *, quirks: bool
) -> np.ndarray:
    """NOTEEVENTS of one block (MIMIC-III); with quirks one admission in ten has none.

    Returns:
        bool [A]: which admissions have a readable note, not one marked as an error.
    """
    texts = texts_of(block, clinical, rng, brackets=True)
    kept = np.flatnonzero((rng.random(len(texts)) > 0.1) | (not quirks))
    start = tables.rows.get("NOTEEVENTS.csv.gz", 0) + 1
    wrong = pl.Series(np.where((rng.random(len(kept)) < 0.02) & quirks, "1", ""))
    frame = pl.DataFrame(
        {
            "ROW_ID": np.arange(start, start + len(kept)),
            "SUBJECT_ID": block.subject[block.adm_patient[kept]],
            "HADM_ID": block.hadm[kept],
            "CHARTDATE": times(block.discharge[kept]).cast(pl.Date),
            "CHARTTIME": pl.Series([None] * len(kept), dtype=pl.String),
            "STORETIME": pl.Series([None] * len(kept), dtype=pl.String),
            "CATEGORY": pl.Series(["Discharge summary"] * len(kept), dtype=pl.String),
            "DESCRIPTION": pl.Series(["Report"] * len(kept), dtype=pl.String),
            "CGID": pl.Series([None] * len(kept), dtype=pl.String),
            "ISERROR": wrong,
            "TEXT": pl.Series([texts[k] for k in kept], dtype=pl.String),
        }
    )
    tables.append(
        "NOTEEVENTS.csv.gz",
        frame.with_columns(pl.when(pl.col("ISERROR") != "").then("ISERROR").alias("ISERROR")),
    )
    return np.isin(np.arange(len(texts)), kept[(wrong == "").to_numpy()])
