"""From raw files to shards: old layouts, faults in time, images after the prediction, notes."""

from __future__ import annotations

import gzip
import logging
import shutil
from typing import TYPE_CHECKING

import polars as pl
import pytest

from data import pipeline
from data.errors import InputError
from data.sources.synthetic import SyntheticTruth, generate
from data.switches import ExtractConfig, Sources

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from data.manifest import Manifest

pytestmark = pytest.mark.ray

ONE = ExtractConfig(partitions=1, image_short_side=32)


def _extract(sources: Sources, out: Path, task: str = "mortality") -> Manifest:
    return pipeline.extract(sources, task, ONE, out, preset="corrected")


def _rows(out: Path) -> pl.DataFrame:
    return pl.read_parquet(out / "shards" / "*.parquet").sort("stay_id")


def test_mimic_iv_1_0_gives_the_shards_of_2_2(
    tmp_path: Path, make_hospital: Callable[..., Path], ray_session: None
) -> None:
    new = make_hospital(tmp_path / "new", form="csv")
    old = tmp_path / "old"
    shutil.copytree(new, old)
    (old / "core").mkdir()
    for name in ("patients", "admissions"):
        shutil.move(old / "hosp" / f"{name}.csv", old / "core" / f"{name}.csv")
    admissions = old / "core" / "admissions.csv"
    admissions.write_bytes(admissions.read_bytes().replace(b",race,", b",ethnicity,", 1))
    assert _extract(Sources(mimic_iv=old), tmp_path / "a").release == "mimic-iv-1.0"
    _extract(Sources(mimic_iv=new), tmp_path / "b")
    assert _rows(tmp_path / "a").equals(_rows(tmp_path / "b"))


def _shift(tables: dict, row: int, column: str, year: str) -> None:
    events = [event for event in tables["chartevents"] if event["itemid"] == "220045"]
    events[row][column] = year + events[row][column][4:]


def test_times_out_of_order_and_late_are_quarantined_and_listed(
    tmp_path: Path, make_hospital: Callable[..., Path], ray_session: None
) -> None:
    def spoil(tables: dict) -> None:
        stay = tables["icustays"][1]
        stay["intime"], stay["outtime"] = stay["outtime"], stay["intime"]
        _shift(tables, 200, "charttime", "2160")
        _shift(tables, 201, "charttime", "2161")

    raw = make_hospital(tmp_path / "raw", edit=spoil)
    manifest = _extract(Sources(mimic_iv=raw), tmp_path / "out")
    aside = {(q.place, q.reason): q for q in manifest.quarantine}
    assert aside["icustays", "times out of order"].examples == ("30002",)
    late = aside["events", "later than death or discharge by more than the margin"]
    assert late.count == 2
    assert all(place.startswith("chart row") for place in late.examples)
    assert manifest.rows == 11
    assert 30002 not in _rows(tmp_path / "out")["stay_id"]


def test_a_stay_without_events_is_counted_under_its_rule(
    tmp_path: Path, make_hospital: Callable[..., Path], ray_session: None
) -> None:
    def silence(tables: dict) -> None:
        for name in ("chartevents", "labevents", "outputevents"):
            tables[name] = [row for row in tables[name] if row["hadm_id"] != "20003"]

    raw = make_hospital(tmp_path / "raw", edit=silence)
    manifest = _extract(Sources(mimic_iv=raw), tmp_path / "out")
    step = next(step for step in manifest.flow if step.rule == "has an event")
    assert (step.rows_in, step.rows_out) == (12, 11)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> SyntheticTruth:
    out = tmp_path_factory.mktemp("h") / "hospital"
    return generate(out, patients=40, seed=4, release="mimic-iv-2.2", image_size=64)


def test_images_after_the_prediction_time_reach_no_feature(
    hospital: SyntheticTruth, tmp_path: Path, ray_session: None
) -> None:
    """Later films are spoilt and moved in the raw files; then those that are used."""
    assert hospital.cxr is not None
    sources = Sources(mimic_iv=hospital.ehr, mimic_cxr=hospital.cxr)
    _extract(sources, tmp_path / "out", "phenotyping_48h")
    before = _rows(tmp_path / "out")
    used = before["dicom_id"].drop_nulls()
    assert len(used) > 5
    for name, early in (("late", False), ("early", True)):
        spoilt = _spoil_images(hospital, tmp_path / name, before, early=early)
        changed = sources.model_copy(update={"mimic_cxr": spoilt})
        _extract(changed, tmp_path / f"out-{name}", "phenotyping_48h")
        after = _rows(tmp_path / f"out-{name}")
        assert after["stay_id"].equals(before["stay_id"])
        assert after.equals(before) is not early


def _spoil_images(
    hospital: SyntheticTruth, folder: Path, samples: pl.DataFrame, *, early: bool
) -> Path:
    """Replace the pixels and the date of the films before or after all their subject's windows."""
    assert hospital.cxr is not None
    shutil.copytree(hospital.cxr, folder)
    path = folder / "mimic-cxr-2.0.0-metadata.csv.gz"
    table = pl.read_csv(path.read_bytes(), infer_schema=False)
    moment = (pl.col("StudyDate") + pl.col("StudyTime").str.extract(r"^(\d+)").str.zfill(6)).alias(
        "moment"
    )
    ends = samples.group_by(pl.col("subject_id").cast(pl.String)).agg(
        pl.col("prediction_time").max().dt.strftime("%Y%m%d%H%M%S").alias("end")
    )
    marked = table.join(ends, on="subject_id", how="left", maintain_order="left").with_columns(
        moment
    )
    late = (pl.col("moment") > pl.col("end")).fill_null(value=True)
    hit = pl.col("dicom_id").is_in(samples["dicom_id"].implode()) if early else late
    chosen = marked.filter(hit)
    assert chosen.height > 0
    later = (pl.col("StudyDate").cast(pl.Int64) + 100_000).cast(pl.String)
    edited = marked.with_columns(pl.when(hit).then(later).otherwise("StudyDate").alias("StudyDate"))
    path.write_bytes(gzip.compress(edited.select(table.columns).write_csv().encode()))
    for row in chosen.iter_rows(named=True):
        image = next(folder.rglob(f"{row['dicom_id']}.jpg"), None)
        if image is not None:
            image.write_bytes(b"no image")
    return folder


def test_notes_are_looked_at_and_said_to_be_unused(
    tmp_path: Path,
    make_hospital: Callable[..., Path],
    hospital: SyntheticTruth,
    ray_session: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    raw = make_hospital(tmp_path / "raw", patients=3)
    with caplog.at_level(logging.WARNING):
        sources = Sources(mimic_iv=raw, notes=hospital.notes)
        assert set(_extract(sources, tmp_path / "out").sources) == {"mimic_iv"}
    assert "discharge found and readable, but task mortality uses none of it" in caplog.text
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no table of notes"):
        _extract(Sources(mimic_iv=raw, notes=tmp_path / "empty"), tmp_path / "x")
    (tmp_path / "empty" / "discharge.csv").write_text("subject_id;text\n1;secret words\n")
    with pytest.raises(InputError, match=r"discharge\.csv: no column") as fault:
        _extract(Sources(mimic_iv=raw, notes=tmp_path / "empty"), tmp_path / "x")
    assert "secret" not in str(fault.value)
    assert not (tmp_path / "x").exists()
