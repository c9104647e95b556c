"""Both releases of a synthetic hospital, read without Ray, against the truth it was made from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl
import pytest

from data.admission_stage import ingest_admissions
from data.extraction import extract_partition
from data.sources.clinical import discharge_file, open_admissions
from data.sources.release import open_release
from data.sources.synthetic import generate
from data.stage import load_tables
from data.switches import ExtractConfig
from data.tasks import ELIXHAUSER_LABELS, task_spec

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("release", ["mimic-iv-2.2", "mimic-iii-1.4"])
def test_labels_and_notes_are_those_that_were_planted(tmp_path: Path, release: str) -> None:
    made = generate(
        tmp_path / "h", patients=120, seed=9, release=release, cxr=False, chart_events_per_stay=0
    )
    opened = open_admissions(open_release(made.ehr))
    staged = ingest_admissions(
        opened, discharge_file(made.notes, opened.name), tmp_path / "work", 1
    )
    tables = load_tables(tmp_path / "work", staged.files_of(0))
    result = extract_partition(tables, task_spec("diagnoses"), ExtractConfig())
    truth = pl.read_parquet(made.truth / "admissions.parquet")
    names = [f"label_{name}" for name in ELIXHAUSER_LABELS]
    joined = result.samples.join(truth, on="hadm_id", how="left")
    assert joined.height > 40
    assert joined["noted"].all()
    assert joined["coded"].all()
    assert joined.select(names).rows() == [tuple(map(int, row)) for row in joined["labels"]]
    first = pl.col("notes").str.split("\nEarlier admission:\n").list.first()
    own = joined.with_columns(first.alias("own"))
    cough_first = own["own"].str.contains("cough came before|First there was cough")
    assert (cough_first == (own["latent_i1"] == 1)).all()
    denied = own["own"].str.contains("denies chest pain")
    assert (denied == (own["latent_i2"] == 1)).all()
    assert not own["notes"].str.contains("Discharge").any()
    assert own["notes"].str.contains("Earlier admission:").any()
    assert own["lab_text"].is_not_null().mean() > 0.9
