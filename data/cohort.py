"""Which ICU stays are in, in the order of the released extraction, and who dies in hospital."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import polars as pl

from data.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from data.ledger import Ledger
    from data.switches import ExtractConfig

MIN_AGE: Final = 18
_MASKED_AGE: Final = 90.0
"""MIMIC-III moves the birth of patients over 89 back by 300 years; the benchmark reads 90."""
_DAYS_PER_YEAR: Final = 365.25
_US_PER_DAY: Final = 86_400_000_000
_DAY: Final = pl.duration(days=1)

_ONE_UNIT: Final = (pl.col("first_careunit") == pl.col("last_careunit")) & pl.col(
    "first_wardid"
).eq_missing(pl.col("last_wardid"))
"""MIMIC-IV has no wards: both are null there."""

STAY_COLUMNS: Final = (
    "subject_id",
    "hadm_id",
    "stay_id",
    "intime",
    "outtime",
    "los",
    "admittime",
    "dischtime",
    "deathtime",
    "dob",
    "dod",
    "sex",
    "age",
    "died",
)


def select_stays(
    tables: Mapping[str, pl.DataFrame], config: ExtractConfig, ledger: Ledger
) -> pl.DataFrame:
    """Apply the stay rules, each a step of the flow.

    The order matters: transfers go first, so that an admission with two stays of which one is a
    transfer survives the rule of one stay per admission.

    Returns:
        STAY_COLUMNS sorted by (subject_id, stay_id). `died` is in-hospital mortality, `age` years.

    Raises:
        InputError: Two different rows of a table have the same key.
    """
    stays = unique_rows(tables["icustays"], "icustays", "stay_id", ledger)
    stays = ledger.keep(
        stays,
        "no transfer between units",
        "stays",
        _ONE_UNIT,
        "First and last care unit (and ward, in MIMIC-III) are the same.",
    )
    joined = _with_admission(stays, tables, ledger)
    ledger.step(
        "admission and patient known",
        "stays",
        (stays.height, joined.height),
        "Inner join with admissions on (subject_id, hadm_id) and with patients on subject_id.",
    )
    ledger.exclude("admission and patient known", stays["stay_id"], joined["stay_id"])
    single = ledger.keep(
        joined,
        "one stay per admission",
        "stays",
        pl.len().over("hadm_id") == 1,
        "Admissions with exactly one remaining ICU stay.",
    )
    adults = ledger.keep(
        single.with_columns(age_at("intime", config).cast(pl.Float64).alias("age")),
        "adults",
        "stays",
        pl.col("age") >= MIN_AGE,
        f"Age of at least {MIN_AGE} years.",
    )
    timed = _with_times(adults, config, ledger)
    return (
        timed.with_columns(_died(config).fill_null(value=False).alias("died"))
        .select(STAY_COLUMNS)
        .sort("subject_id", "stay_id")
    )


def with_diagnoses(stays: pl.DataFrame, labels: pl.DataFrame, ledger: Ledger) -> pl.DataFrame:
    """Stays whose admission has a diagnosis, with their `phenotypes` (25 labels each).

    Args:
        stays: From `select_stays`.
        labels: hadm_id, labels.
        ledger: Where the step is noted.
    """
    labelled = stays.join(
        labels.rename({"labels": "phenotypes"}), on="hadm_id", how="left", maintain_order="left"
    )
    return ledger.keep(
        labelled,
        "diagnoses known",
        "stays",
        pl.col("phenotypes").is_not_null(),
        "The released code merges stays with their diagnoses; a stay without any drops out.",
    )


def unique_rows(frame: pl.DataFrame, table: str, key: str, ledger: Ledger) -> pl.DataFrame:
    """The table with identical rows merged and counted; one key with different rows is refused."""
    distinct = frame.unique()
    if distinct.height < frame.height:
        repeated = frame.filter(frame.is_duplicated())[key].unique().sort()
        ledger.set_aside(table, "identical row again", frame.height - distinct.height, repeated)
    clash = distinct.filter(pl.col(key).is_duplicated())[key].sort()
    if len(clash):
        raise InputError(
            f"table {table}: {key} {clash.to_list()[0]} has different rows with the same key; "
            f"{key} must be unique, remove all but one of them"
        )
    return distinct


def _with_admission(
    stays: pl.DataFrame, tables: Mapping[str, pl.DataFrame], ledger: Ledger
) -> pl.DataFrame:
    admissions = unique_rows(tables["admissions"], "admissions", "hadm_id", ledger).select(
        "subject_id", "hadm_id", "admittime", "dischtime", "deathtime"
    )
    patients = unique_rows(tables["patients"], "patients", "subject_id", ledger)
    return stays.join(admissions, on=["subject_id", "hadm_id"]).join(patients, on="subject_id")


def age_at(time: str, config: ExtractConfig) -> pl.Expr:
    """Years at a column of times: from the date of birth (MIMIC-III), or the anchor (IV)."""
    days = (pl.col(time) - pl.col("dob")).dt.total_microseconds() / _US_PER_DAY
    years = days / _DAYS_PER_YEAR
    anchor = pl.col("anchor_age")
    if config.age == "admission":
        anchor = anchor + pl.col(time).dt.year() - pl.col("anchor_year")
    born = pl.when(years > 2 * _MASKED_AGE).then(_MASKED_AGE).otherwise(years)
    return pl.when(pl.col("dob").is_not_null()).then(born).otherwise(anchor)


def _with_times(stays: pl.DataFrame, config: ExtractConfig, ledger: Ledger) -> pl.DataFrame:
    """Stays with a length; where times are read as they are meant, also in their order."""
    known = pl.all_horizontal(pl.col("los", "intime", "outtime").is_not_null())
    timed = ledger.keep(
        stays, "length of stay known", "stays", known, "The released code drops stays without los."
    )
    if config.event_to_stay == "as_found":
        return timed
    ordered = (pl.col("intime") <= pl.col("outtime")) & (
        pl.col("admittime") <= pl.col("dischtime")
    ).fill_null(value=True)
    late = timed.filter(~ordered)
    ledger.set_aside("icustays", "times out of order", late.height, late["stay_id"].sort())
    return ledger.keep(
        timed,
        "times in order",
        "stays",
        ordered,
        "The stay does not end before it begins, nor does its admission; others are quarantined.",
    )


def _died(config: ExtractConfig) -> pl.Expr:
    """In-hospital mortality.

    `mixed` is the released rule: date of death (a date: midnight) or time of death in
    [admission, discharge]. `time` asks the time of death, from the admission to a day after the
    discharge: MIMIC has one only for deaths in hospital, and often writes such a discharge as the
    midnight before. Only where there is no time of death does the date count, as a day: from the
    day of admission to that of discharge.
    """
    known = pl.col("deathtime").is_not_null()
    if config.deaths == "mixed":
        by_date = pl.col("dod").is_between("admittime", "dischtime").fill_null(value=False)
        return by_date | pl.col("deathtime").is_between("admittime", "dischtime")
    by_time = pl.col("deathtime").is_between("admittime", pl.col("dischtime") + _DAY)
    by_day = (
        pl.col("dod")
        .dt.date()
        .is_between(pl.col("admittime").dt.date(), pl.col("dischtime").dt.date())
    )
    return pl.when(known).then(by_time).otherwise(by_day)
