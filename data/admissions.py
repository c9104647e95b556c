"""From the typed tables of some subjects to samples that are hospital admissions. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import polars as pl

from data.admission_labs import lab_matrix
from data.admission_notes import note_texts
from data.code_lists import admission_labels, code_lists
from data.cohort import age_at, unique_rows
from data.splits import assign_split

if TYPE_CHECKING:
    from collections.abc import Mapping

    from data.ledger import Ledger
    from data.switches import ExtractConfig
    from data.tasks import TaskSpec

_COHORT: Final = (
    "subject_id",
    "hadm_id",
    "admittime",
    "dischtime",
    "sex",
    "age",
    "labels",
    "visit",
    "eligible",
)


def admission_samples(
    tables: Mapping[str, pl.DataFrame], task: TaskSpec, config: ExtractConfig, ledger: Ledger
) -> pl.DataFrame:
    """One row an admission: labels, kept note, abnormal results as text, results by item.

    The prediction time is the discharge. Labs known later are left out; so are summaries of a later
    day (`late_notes = keep` moves the prediction time to theirs instead).

    Args:
        tables: Canonical: patients, admissions, diagnoses, labs, lab_names, notes, given_splits.
        task: Its labels and code lists.
        config: `admissions` holds the switches of this cohort.
        ledger: Where each rule is noted.

    Raises:
        InputError: Two different rows of one key, or a label file that is not understood.
    """
    settings = config.admissions
    admissions = select_admissions(tables, task, config, ledger)
    noted = note_texts(tables["notes"], admissions, settings, ledger)
    with_notes = ledger.keep(
        admissions.join(noted, on="hadm_id", how="left", maintain_order="left"),
        "is a target visit",
        "admissions",
        pl.col("eligible"),
        "All visits, or from the second on; others only lend their notes as history.",
    )
    told = ledger.keep(
        with_notes,
        "has a section of the note",
        "admissions",
        pl.col("notes").is_not_null() | (not settings.require_notes),
        "A discharge summary in time with at least one of the kept sections.",
    )
    moved = told.with_columns(
        pl.max_horizontal("dischtime", "notes_available_at").alias("prediction_time")
    )
    measured = lab_matrix(tables["labs"], tables["lab_names"], moved, config, ledger)
    complete = ledger.keep(
        moved.join(measured, on="hadm_id", how="left", maintain_order="left"),
        "has a lab result",
        "admissions",
        pl.col("labs").is_not_null() | (not settings.require_labs),
        "At least one numeric laboratory result inside the window.",
    )
    anything = ledger.keep(
        complete,
        "has a note or labs",
        "admissions",
        pl.col("labs").is_not_null() | pl.col("notes").is_not_null(),
        "A sample without any modality says nothing.",
    )
    return _split(anything, tables, config, ledger)


def select_admissions(
    tables: Mapping[str, pl.DataFrame], task: TaskSpec, config: ExtractConfig, ledger: Ledger
) -> pl.DataFrame:
    """The admissions of the cohort, those that are no target included, sorted by subject and time.

    Returns:
        subject_id, hadm_id, admittime, dischtime, sex, age, labels, visit (0 for a patient's first
        admission in the tables), eligible (a target visit).
    """
    settings = config.admissions
    found = unique_rows(tables["admissions"], "admissions", "hadm_id", ledger)
    patients = unique_rows(tables["patients"], "patients", "subject_id", ledger)
    known = found.join(patients, on="subject_id")
    ledger.step(
        "patient known", "admissions", (found.height, known.height), "Inner join on subject_id."
    )
    ordered = (pl.col("admittime") <= pl.col("dischtime")).fill_null(value=False)
    wrong = known.filter(~ordered)
    ledger.set_aside(
        "admissions", "times missing or out of order", wrong.height, wrong["hadm_id"].sort()
    )
    timed = ledger.keep(
        known,
        "times in order",
        "admissions",
        ordered,
        "Admission and discharge are known and in their order; others are quarantined.",
    ).sort("subject_id", "admittime", "hadm_id")
    several = ledger.keep(
        timed.with_columns(pl.int_range(pl.len()).over("subject_id").alias("visit")),
        "several visits",
        "admissions",
        pl.len().over("subject_id") >= settings.min_visits,
        f"Patients with at least {settings.min_visits} recorded visits.",
    )
    adults = ledger.keep(
        several.with_columns(age_at("admittime", config).cast(pl.Float64).alias("age")),
        "adults",
        "admissions",
        pl.col("age") >= settings.min_age,
        f"Age of at least {settings.min_age} years; newborns with them.",
    )
    ledger.count("diagnoses of no admission", tables["diagnoses"]["hadm_id"].null_count())
    labels = admission_labels(tables["diagnoses"], code_lists(task, settings), settings)
    coded = ledger.keep(
        adults.join(labels, on="hadm_id", how="left", maintain_order="left"),
        "diagnoses known",
        "admissions",
        pl.col("labels").is_not_null(),
        "An admission without any diagnosis code has no labels.",
    )
    target = pl.col("visit") > 0 if settings.target_visits == "from_second" else pl.lit(value=True)
    return coded.with_columns(target.alias("eligible")).select(_COHORT)


def _split(
    samples: pl.DataFrame,
    tables: Mapping[str, pl.DataFrame],
    config: ExtractConfig,
    ledger: Ledger,
) -> pl.DataFrame:
    """Each subject's split: the lists of the config, else the data set's own, else the hash."""
    assigned = samples.with_columns(assign_split(samples["subject_id"], config.split))
    if config.split.val_subjects is not None:
        return assigned
    own = tables["given_splits"].rename({"split": "given"}).unique(subset="subject_id")
    assigned = assigned.join(own, on="subject_id", how="left", maintain_order="left")
    if tables["meds"].height:
        by_hash = assigned["given"].null_count()
        ledger.count("admissions split by a hash of their subject", by_hash)
    return assigned.with_columns(pl.coalesce("given", "split").alias("split"))
