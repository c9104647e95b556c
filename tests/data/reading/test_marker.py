"""Invented patients are never taken for real ones: the mark follows them to the manifest."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import polars as pl
import pytest

from data import pipeline
from data.check import check
from data.events import item_ids
from data.manifest import Manifest
from data.sources.marker import MARKER
from data.sources.mimic_cxr import find_tables
from data.sources.release import open_release
from data.sources.synthetic import SyntheticTruth, generate
from data.stage import load_stage, stage
from data.switches import ExtractConfig, Sources

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = ExtractConfig(partitions=1, image_short_side=32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SyntheticTruth:
    out = tmp_path_factory.mktemp("marked") / "hospital"
    return generate(out, patients=25, seed=1, release="mimic-iv-2.2", image_size=64)


def test_every_raw_folder_is_marked_and_named(made: SyntheticTruth) -> None:
    assert made.cxr is not None
    assert made.notes is not None
    for folder in (made.ehr, made.cxr, made.notes):
        assert "no row, image or note here is of a real patient" in (folder / MARKER).read_text()
    assert open_release(made.ehr).name == "mimic-iv-2.2-synthetic"
    assert find_tables(made.cxr)[0] == "mimic-cxr-jpg-2.0.0-synthetic"


def test_mimic_iii_is_marked_and_keeps_its_items(tmp_path: Path) -> None:
    made = generate(
        tmp_path / "h", patients=5, seed=1, release="mimic-iii-1.4", chart_events_per_stay=0
    )
    release = open_release(made.ehr)
    assert release.name == "mimic-iii-1.4-synthetic"
    assert item_ids(release.name) == item_ids("mimic-iii-1.4") != item_ids("mimic-iv-2.2")


@pytest.mark.ray
def test_the_mark_survives_staging_and_extraction(
    made: SyntheticTruth, tmp_path: Path, ray_session: None
) -> None:
    staged = stage(made.ehr, tmp_path / "staged", partitions=1)
    assert staged.release == load_stage(tmp_path / "staged").release == "mimic-iv-2.2-synthetic"
    for name, source in (("raw", made.ehr), ("from-staged", tmp_path / "staged")):
        out = tmp_path / name
        pipeline.extract(Sources(mimic_iv=source), "mortality", CONFIG, out, preset="corrected")
        assert Manifest.load(out).release == "mimic-iv-2.2-synthetic"
        assert check(out) == []


@pytest.mark.ray
def test_invented_images_name_a_cohort_of_images(
    made: SyntheticTruth, tmp_path: Path, ray_session: None
) -> None:
    sources = Sources(mimic_cxr=made.cxr)
    pipeline.extract(sources, "radiology", CONFIG, tmp_path / "out", preset="corrected")
    assert Manifest.load(tmp_path / "out").release == "mimic-cxr-jpg-2.0.0-synthetic"


@pytest.mark.ray
def test_invented_images_beside_other_tables_are_named_too(
    made: SyntheticTruth, tmp_path: Path, ray_session: None
) -> None:
    tables = tmp_path / "mimiciv" / "2.2"
    shutil.copytree(made.ehr, tables, ignore=shutil.ignore_patterns(MARKER))
    sources = Sources(mimic_iv=tables, mimic_cxr=made.cxr)
    pipeline.extract(sources, "phenotyping_48h", CONFIG, tmp_path / "out", preset="corrected")
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.release == "mimic-iv-2.2+mimic-cxr-jpg-2.0.0-synthetic"
    assert pl.read_parquet(tmp_path / "out" / manifest.files[0].name)["cxr"].count() > 0
