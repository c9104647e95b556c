"""The kept text of each admission's discharge summary, with that of earlier visits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import polars as pl

from data.sections import kept_text
from data.sources.notes import DISCHARGE

if TYPE_CHECKING:
    from datetime import datetime

    from data.ledger import Ledger
    from data.switches import AdmissionConfig

EARLIER: Final = "Earlier admission:"
"""The line before an earlier visit's sections."""
SCHEMA: Final = {
    "hadm_id": pl.Int64(),
    "notes": pl.String(),
    "notes_available_at": pl.Datetime("us"),
}
_Note = tuple[str, "datetime"]


def note_texts(
    notes: pl.DataFrame, admissions: pl.DataFrame, config: AdmissionConfig, ledger: Ledger
) -> pl.DataFrame:
    """The note of each admission that has one: its own sections, then those of earlier visits.

    An admission's note is its last report and all addenda. Only the day of most summaries is known,
    so a summary counts as late when its day comes after the discharge's; one of the discharge's day
    is dated the discharge at the latest. Earlier visits are those that began earlier and whose note
    was known by this discharge; the newest comes first, and nothing of an earlier visit is used
    without its own line before it.

    Args:
        notes: The canonical table.
        admissions: Of `select_admissions`.
        config: `late_notes`, `sections`, `headers`, `history_visits`, `note_limit`.
        ledger: Counts what was dropped and cut; it never sees text.

    Returns:
        hadm_id, notes, notes_available_at (SCHEMA).
    """
    own = _own_notes(notes, admissions, config, ledger)
    texts: list[str] = []
    found: list[tuple[int, str, datetime]] = []
    cut = 0
    earlier: list[_Note] = []
    subject = None
    columns = admissions.select("subject_id", "hadm_id", "dischtime")
    for subject_id, hadm_id, dischtime in columns.iter_rows():
        if subject_id != subject:
            earlier, subject = [], subject_id
        note = own.get(hadm_id)
        horizon = dischtime if note is None else max(dischtime, note[1])
        known = [past for past in reversed(earlier) if past[1] <= horizon]
        history = known[: config.history_visits]
        texts = [note[0]] if note else []
        texts += [f"{EARLIER}\n{text}" for text, _ in history]
        if texts and (note or not config.require_notes):
            whole = "\n".join(texts)
            cut += len(whole) > config.note_limit
            times = [past[1] for past in (([note] if note else []) + history)]
            found.append((hadm_id, whole[: config.note_limit], max(times)))
        if note:
            earlier.append(note)
    ledger.count("notes cut to note_limit", cut)
    return pl.DataFrame(found, SCHEMA, orient="row")


def _own_notes(
    notes: pl.DataFrame, admissions: pl.DataFrame, config: AdmissionConfig, ledger: Ledger
) -> dict[int, _Note]:
    """hadm_id -> the kept text of its summary, and when it was known."""
    summaries = notes.filter(pl.col("category") == DISCHARGE)
    joined = summaries.drop("subject_id").join(
        admissions.select("hadm_id", "dischtime"), on="hadm_id"
    )
    ledger.step(
        "summary of an admission of the cohort",
        "notes",
        (summaries.height, joined.height),
        "By hadm_id; a summary without one belongs to no admission.",
    )
    late = pl.col("charttime").dt.date() > pl.col("dischtime").dt.date()
    in_time = ledger.keep_each(
        joined,
        "notes",
        (
            ("note has a time", pl.col("charttime").is_not_null(), "Else it may be a later one."),
            (
                "written by the day of discharge",
                ~late | (config.late_notes == "keep"),
                "A summary of a later day knew what came after.",
            ),
            ("note has text", pl.col("text").fill_null("") != "", "Empty texts."),
        ),
    )
    dated = in_time.with_columns(
        pl.when(late)
        .then("charttime")
        .otherwise(pl.min_horizontal("charttime", "dischtime"))
        .alias("known")
    ).sort("hadm_id", "addendum", "charttime", "storetime", "text", nulls_last=False)
    found: dict[int, _Note] = {}
    without = 0
    for (hadm_id,), rows in dated.group_by("hadm_id", maintain_order=True):
        reports = rows.filter(~pl.col("addendum")).tail(1)
        used = pl.concat([reports, rows.filter("addendum")])
        kept = [
            kept_text(text, headers=config.headers, sections=config.sections)
            for text in used["text"]
        ]
        text = "\n".join(part for part in kept if part.strip())
        if text:
            found[int(hadm_id)] = (text, used["known"].max())  # type: ignore[assignment]
        else:
            without += 1
    ledger.count("summaries without any kept section", without)
    return found
