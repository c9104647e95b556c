"""Images through the pipeline: paired, quarantined, or samples of their own."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pytest
from PIL import Image

from data import pipeline
from data.check import check
from data.switches import ExtractConfig, Sources
from data.tasks import CHEXPERT_LABELS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from data.manifest import Manifest

pytestmark = pytest.mark.ray

CONFIG = ExtractConfig(partitions=2, image_short_side=32)


def _table(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def cxr_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder: an AP image 12 h after each admission of the tiny hospital, three spoilt."""
    folder = tmp_path_factory.mktemp("cxr")
    metadata, labels, splits = [], [], []
    rng = np.random.default_rng(0)
    for index in range(12):
        subject, study, dicom = 10_001 + index, 50_001 + index, f"dicom-{index:02d}"
        day = np.datetime64("2150-01-01") + 3 * index
        keys = {"dicom_id": dicom, "subject_id": subject, "study_id": study}
        metadata.append(
            {
                **keys,
                "ViewPosition": "AP" if index != 3 else "LATERAL",
                "StudyDate": str(day).replace("-", ""),
                "StudyTime": "120000.0",
            }
        )
        splits.append({**keys, "split": "train"})
        found = {name: "1.0" if rng.random() < 0.3 else "" for name in CHEXPERT_LABELS}
        labels.append({"subject_id": subject, "study_id": study, **found})
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (90, 70), dtype=np.uint8)).save(stream, "JPEG")
        content = stream.getvalue()
        if index != 0:
            spoilt = {1: b"", 2: content[:200]}
            (folder / f"{dicom}.jpg").write_bytes(spoilt.get(index, content))
    _table(folder / "mimic-cxr-2.0.0-metadata.csv", metadata)
    _table(folder / "mimic-cxr-2.0.0-chexpert.csv", labels)
    _table(folder / "mimic-cxr-2.0.0-split.csv", splits)
    return folder


def _quarantined(manifest: Manifest) -> int:
    return sum(item.count for item in manifest.quarantine if item.place == "images")


def test_a_stay_goes_on_without_its_spoilt_image(
    tmp_path: Path, make_hospital: Callable[..., Path], cxr_folder: Path, ray_session: None
) -> None:
    sources = Sources(mimic_iv=make_hospital(tmp_path / "raw"), mimic_cxr=cxr_folder)
    out = tmp_path / "out"
    manifest = pipeline.extract(sources, "mortality", CONFIG, out, preset="corrected")
    assert check(out) == []
    rows = pl.read_parquet(out / "shards" / "*.parquet").sort("subject_id")
    assert rows.height == 12
    expected = [False] * 4 + [True] * 8
    for column in ("cxr", "dicom_id", "cxr_available_at", "cxr_labels"):
        assert rows[column].is_not_null().to_list() == expected
    sizes = {min(Image.open(io.BytesIO(content)).size) for content in rows["cxr"].drop_nulls()}
    assert sizes == {32}
    assert _quarantined(manifest) == 3
    readable = {step.rule: step for step in manifest.flow}["cxr readable"]
    assert (readable.rows_in, readable.rows_out) == (11, 8)
    both = sum(counts["ehr+cxr"] for counts in manifest.overlap.values())
    assert both == 8
    assert set(manifest.sources) == {"mimic_iv", "mimic_cxr"}


def test_radiology_needs_no_hospital(tmp_path: Path, cxr_folder: Path, ray_session: None) -> None:
    out = tmp_path / "out"
    sources = Sources(mimic_cxr=cxr_folder)
    manifest = pipeline.extract(sources, "radiology", CONFIG, out, preset="corrected")
    assert check(out) == []
    rows = pl.read_parquet(out / "shards" / "*.parquet")
    assert sorted(rows["dicom_id"]) == [f"dicom-{index:02d}" for index in range(3, 12)]
    assert rows["ehr"].null_count() == rows.height == manifest.rows == 9
    assert manifest.release == "mimic-cxr-jpg-2.0.0"
    assert _quarantined(manifest) == 3
