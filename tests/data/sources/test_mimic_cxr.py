from __future__ import annotations

import gzip
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest

from data.errors import InputError
from data.sources.canonical import TABLES
from data.sources.mimic_cxr import read_mimic_cxr
from data.tasks import CHEXPERT_LABELS

METADATA = (
    "dicom_id,subject_id,study_id,ViewPosition,Rows,Columns,StudyDate,StudyTime\n"
    "aa-1,10000032,50414267,AP,3056,2544,21800506,213014.531\n"
    "aa-2,10000032,50414268,PA,3056,2544,21800507,1.5\n"
    "bb-1,10001176,53186264,,2048,2500,21860115,61231\n"
)
SPLIT = (
    "dicom_id,study_id,subject_id,split\naa-1,50414267,10000032,train\nbb-1,1,10001176,validate\n"
)
HEADER = ",".join(("subject_id", "study_id", *CHEXPERT_LABELS))
CHEXPERT = f"{HEADER}\n10000032,50414267,1.0,-1.0,0.0{',' * 11}\n"
DEEP = "files/p10/p10000032/s50414267/aa-1.jpg"


def write_folder(
    folder: Path, *, metadata: str = METADATA, chexpert: str = CHEXPERT, split: str = SPLIT
) -> Path:
    for kind, text in (("metadata", metadata), ("chexpert", chexpert), ("split", split)):
        (folder / f"mimic-cxr-2.0.0-{kind}.csv").write_text(text)
    touch(folder / DEEP)
    return folder


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def test_the_canonical_table(tmp_path):
    source = read_mimic_cxr(write_folder(tmp_path))
    assert source.table.schema == TABLES["cxr"]
    assert (source.release, source.layout) == ("mimic-cxr-jpg-2.0.0", "folders")
    first, second, third = source.table.rows(named=True)
    assert first["path"] == DEEP
    assert first["studytime"] == datetime.fromisoformat("2180-05-06T21:30:14.531")
    assert first["chexpert"] == [1.0, -1.0, 0.0, *[None] * 11]
    assert (first["view"], first["cxr_split"]) == ("AP", "train")
    assert second["studytime"] == datetime.fromisoformat("2180-05-07T00:00:01.500")
    assert second["chexpert"] is None is second["cxr_split"]
    assert third["view"] is None
    assert third["studytime"] == datetime.fromisoformat("2186-01-15T06:12:31")
    assert third["cxr_split"] == "validate"


def test_formats_and_letter_case_read_the_same(tmp_path):
    plain, packed, typed = (tmp_path / name for name in ("csv", "gz", "parquet"))
    for folder in (plain, packed, typed):
        folder.mkdir()
    expected = read_mimic_cxr(write_folder(plain)).table
    for kind, text in (("METADATA", METADATA), ("CHEXPERT", CHEXPERT), ("SPLIT", SPLIT)):
        header, rest = text.split("\n", 1)
        upper = f"{header.upper()}\n{rest}"
        (packed / f"MIMIC-CXR-2.0.0-{kind}.CSV.GZ").write_bytes(gzip.compress(upper.encode()))
    touch(packed / DEEP)
    assert read_mimic_cxr(packed).table.equals(expected)

    for kind, text in (("metadata", METADATA), ("chexpert", CHEXPERT), ("split", SPLIT)):
        pl.read_csv(text.encode()).write_parquet(typed / f"mimic-cxr-2.0.0-{kind}.parquet")
    touch(typed / DEEP)
    assert read_mimic_cxr(typed).table.equals(expected)


def test_row_order_does_not_matter(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    expected = read_mimic_cxr(write_folder(tmp_path / "a")).table
    header, *rows = METADATA.strip().split("\n")
    turned = "\n".join([header, *reversed(rows)])
    assert read_mimic_cxr(write_folder(tmp_path / "b", metadata=turned)).table.equals(expected)


@pytest.mark.parametrize(
    ("image", "layout", "path"),
    [
        ("aa-1.jpg", "flat", "aa-1.jpg"),
        ("files/aa-1.jpg", "flat in files/", "files/aa-1.jpg"),
        (
            "p10/p10000032/s50414267/aa-1.jpg",
            "folders without files/",
            "p10/p10000032/s50414267/aa-1.jpg",
        ),
    ],
)
def test_layouts_are_found_without_walking(tmp_path, monkeypatch, image, layout, path):
    write_folder(tmp_path)
    (tmp_path / DEEP).unlink()
    touch(tmp_path / image)

    def refuse(*_, **__):
        raise AssertionError("the tree was walked")

    monkeypatch.setattr("os.walk", refuse)
    monkeypatch.setattr(Path, "rglob", refuse)
    monkeypatch.setattr(Path, "glob", refuse)
    source = read_mimic_cxr(tmp_path)
    assert source.layout == layout
    assert source.table["path"][0] == path


def test_a_missing_first_image_does_not_hide_the_layout(tmp_path):
    write_folder(tmp_path)
    (tmp_path / DEEP).unlink()
    touch(tmp_path / "bb-1.jpg")
    assert read_mimic_cxr(tmp_path).layout == "flat"


def test_no_image_at_all_is_an_error_only_if_images_are_wanted(tmp_path):
    write_folder(tmp_path)
    (tmp_path / DEEP).unlink()
    with pytest.raises(InputError, match=r"none of the first 3 images.*files/p10/p10000032"):
        read_mimic_cxr(tmp_path)
    assert read_mimic_cxr(tmp_path, images=False).table["path"][0] == DEEP


def test_release_2_1_keeps_the_table_names_of_2_0(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "mimic-cxr-2.1.0-test-set-labeled.csv").write_text("study_id\n")
    assert read_mimic_cxr(tmp_path).release == "mimic-cxr-jpg-2.1.0"


def test_an_image_without_time_is_set_aside(tmp_path):
    text = METADATA + "cc-1,10001176,5,AP,1,1,21860115,\n"
    source = read_mimic_cxr(write_folder(tmp_path, metadata=text))
    assert source.table.height == 3
    assert [(item.count, item.examples) for item in source.quarantine] == [(1, ("cc-1",))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"metadata": METADATA.replace("StudyTime", "AcquisitionTime")},
            "metadata.csv: no column studytime .found: dicom_id,.*acquisitiontime",
        ),
        ({"metadata": METADATA.replace(",", ";")}, "is the delimiter a comma"),
        ({"metadata": METADATA.replace("61231", "616131")}, "row 4: studytime '616131' is not HH"),
        ({"metadata": METADATA.replace("21860115", "2186-1")}, "row 4: studydate '2186-1' is not"),
        ({"metadata": METADATA.replace(",10001176", ",p10")}, "row 4: subject_id 'p10' is no int"),
        ({"metadata": METADATA.replace("bb-1", "aa-1")}, "row 4: dicom_id 'aa-1' appears twice"),
        ({"metadata": METADATA.replace("bb-1", "../bb")}, "dicom_id '../bb' is no DICOM id"),
        ({"metadata": METADATA.replace("bb-1", "")}, "row 4: dicom_id None is blank"),
        ({"chexpert": CHEXPERT.replace("-1.0", "2.0")}, "row 2: cardiomegaly '2.0' is none of 1"),
        ({"chexpert": CHEXPERT.replace("Edema", "Oedema")}, "no column edema"),
        ({"chexpert": CHEXPERT + "1,50414267" + "," * 14 + "\n"}, "study_id '50414267' appears"),
    ],
)
def test_malformed_tables_are_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message) as caught:
        read_mimic_cxr(write_folder(tmp_path, **change))
    assert "mimic-cxr-jpg-2.0.0" in str(caught.value)


@pytest.mark.parametrize("kind", ["metadata", "chexpert", "split"])
def test_a_missing_table_is_refused(tmp_path, kind):
    write_folder(tmp_path)
    (tmp_path / f"mimic-cxr-2.0.0-{kind}.csv").unlink()
    with pytest.raises(InputError, match=rf"no table mimic-cxr-2\.0\.0-{kind}.*found: mimic-cxr"):
        read_mimic_cxr(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_mimic_cxr(tmp_path / "cxr")


def test_damaged_files_are_refused(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "mimic-cxr-2.0.0-metadata.csv"
    path.write_bytes(METADATA.encode().replace(b"AP", b"\xff\xfe"))
    with pytest.raises(InputError, match=r"metadata\.csv: not readable"):
        read_mimic_cxr(tmp_path)
    path.unlink()
    packed = gzip.compress(METADATA.encode())
    path.with_suffix(".csv.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match="the gzip file is cut off"):
        read_mimic_cxr(tmp_path)
