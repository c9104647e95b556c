from __future__ import annotations

from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest

from data.pairing import image_sample_schema, pair_images, radiology_samples
from data.schema import SHARD_SCHEMA
from data.sources.canonical import TABLES
from data.splits import assign_split
from data.switches import ExtractConfig, Split
from data.tasks import TASKS

START = datetime.fromisoformat("2150-01-01T00:00:00")
LABELS = [1.0, -1.0, 0.0, *[None] * 10, 1.0]


def images(*rows: tuple[int, str, float, str]) -> pl.DataFrame:
    """subject_id, dicom_id, hours after START, view."""
    return pl.DataFrame(
        [
            {
                "subject_id": subject,
                "study_id": 1,
                "dicom_id": dicom,
                "view": view,
                "studytime": START + timedelta(hours=hours),
                "path": f"{dicom}.jpg",
                "cxr_split": "train",
                "chexpert": LABELS,
            }
            for subject, dicom, hours, view in rows
        ],
        schema=TABLES["cxr"],
    )


def stays(*rows: tuple[int, int, float, float]) -> pl.DataFrame:
    """subject_id, stay_id, and intime and outtime in hours after START."""
    return pl.DataFrame(
        [
            (subject, stay, START + timedelta(hours=begin), START + timedelta(hours=end))
            for subject, stay, begin, end in rows
        ],
        schema={
            "subject_id": pl.Int64,
            "stay_id": pl.Int64,
            "intime": pl.Datetime("us"),
            "outtime": pl.Datetime("us"),
        },
        orient="row",
    )


def chosen(stay_table, cxr, task="phenotyping", **switches) -> dict[int, str]:
    paired = pair_images(stay_table, cxr, TASKS[task], ExtractConfig(**switches))
    return dict(paired.images.select("stay_id", "dicom_id").rows())


def test_latest_frontal_image_inside_the_stay():
    cxr = images(
        (1, "before", -0.01, "AP"),
        (1, "first", 0.0, "AP"),
        (1, "later", 30.0, "AP"),
        (1, "lateral", 31.0, "LATERAL"),
        (1, "pa", 32.0, "PA"),
        (1, "after", 60.01, "AP"),
        (2, "other patient", 40.0, "AP"),
    )
    assert chosen(stays((1, 10, 0, 60)), cxr) == {10: "later"}
    assert chosen(stays((1, 10, 0, 60)), cxr, cxr_view="PA") == {10: "pa"}
    assert chosen(stays((1, 10, 0, 30)), cxr) == {10: "later"}
    assert chosen(stays((1, 10, 0, 29.99)), cxr) == {10: "first"}
    assert chosen(stays((3, 30, 0, 60)), cxr) == {}


def test_the_window_is_the_tasks_and_the_switch_looks_ahead():
    cxr = images((1, "early", 5, "AP"), (1, "edge", 48, "AP"), (1, "late", 48.001, "AP"))
    table = stays((1, 10, 0, 100))
    assert chosen(table, cxr, "mortality") == {10: "edge"}
    assert chosen(table, cxr, "phenotyping_48h") == {10: "edge"}
    assert chosen(table, cxr, "phenotyping") == {10: "late"}
    assert chosen(table, cxr, "mortality", cxr_window="stay") == {10: "late"}
    # The window of a task does not end with a shorter stay; a whole stay does.
    assert chosen(stays((1, 10, 0, 20)), cxr, "phenotyping_48h") == {10: "edge"}
    assert chosen(stays((1, 10, 0, 20)), cxr, "phenotyping") == {10: "early"}


def test_ties_in_time_go_to_the_largest_id_whatever_the_order():
    cxr = images((1, "b", 5, "AP"), (1, "c", 5, "AP"), (1, "a", 5, "AP"))
    for seed in range(5):
        shuffled = cxr.sample(fraction=1.0, shuffle=True, seed=seed)
        assert chosen(stays((1, 10, 0, 9)), shuffled) == {10: "c"}


def test_against_a_slow_search():
    rng = np.random.default_rng(0)
    cxr = images(
        *(
            (int(rng.integers(1, 12)), f"d{n:03}", round(float(rng.uniform(-20, 200)), 1), view)
            for n, view in enumerate(rng.choice(["AP", "PA", "LATERAL"], 400))
        )
    )
    table = stays(*((s, 100 + s, float(rng.uniform(0, 50)), 120.0) for s in range(1, 12)))
    for task in ("mortality", "phenotyping"):
        window = TASKS[task].window_hours
        expected = {}
        for subject, stay, begin, end in table.iter_rows():
            stop = end if window is None else begin + timedelta(hours=window)
            inside = [
                (row["studytime"], row["dicom_id"])
                for row in cxr.iter_rows(named=True)
                if row["subject_id"] == subject
                and row["view"] == "AP"
                and begin <= row["studytime"] <= stop
            ]
            if inside:
                expected[stay] = max(inside)[1]
        assert chosen(table, cxr, task) == expected
        assert len(expected) > 5


def test_columns_labels_and_flow():
    cxr = images((1, "a", 1, "AP"), (1, "b", 2, "AP"), (1, "c", 3, "PA"), (9, "d", 1, "AP"))
    paired = pair_images(stays((1, 10, 0, 60)), cxr, TASKS["mortality"], ExtractConfig())
    (row,) = paired.images.rows(named=True)
    assert row["path"] == "b.jpg"
    assert row["cxr_available_at"] == START + timedelta(hours=2)
    assert row["cxr_labels"] == [1.0, *[0.0] * 12, 1.0]
    counted = [(step.rule, step.rows_in, step.rows_out) for step in paired.flow]
    assert counted == [
        ("cxr view", 4, 3),
        ("cxr cohort", 3, 2),
        ("cxr window", 2, 2),
        ("cxr latest", 2, 1),
    ]


def test_an_image_without_chexpert_row_has_no_labels():
    cxr = images((1, "a", 1, "AP")).with_columns(chexpert=None).cast(TABLES["cxr"])
    paired = pair_images(stays((1, 10, 0, 60)), cxr, TASKS["mortality"], ExtractConfig())
    assert paired.images["cxr_labels"].to_list() == [None]


def test_empty_tables():
    nothing = images().clear()
    paired = pair_images(stays((1, 10, 0, 60)), nothing, TASKS["mortality"], ExtractConfig())
    assert paired.images.is_empty()
    assert [step.rows_out for step in paired.flow] == [0, 0, 0, 0]
    assert radiology_samples(nothing, ExtractConfig()).samples.is_empty()


def test_radiology_samples_use_every_view_and_uncertain_is_negative():
    cxr = images((2, "b", 5, "LATERAL"), (1, "a", 5, "PA"))
    unlabelled = images((3, "z", 5, "AP")).with_columns(
        chexpert=pl.lit(None, dtype=pl.List(pl.Float32))
    )
    result = radiology_samples(pl.concat([cxr, unlabelled]), ExtractConfig())
    assert result.samples["dicom_id"].to_list() == ["a", "b"]
    assert result.samples["labels"].to_list() == [[1.0, *[0.0] * 12, 1.0]] * 2
    assert [(step.rows_in, step.rows_out) for step in result.flow] == [(3, 2)]
    assert result.samples["stay_id"].null_count() == 2 == result.samples["ehr"].null_count()
    assert (result.samples["cxr_available_at"] == result.samples["prediction_time"]).all()


def test_radiology_samples_fit_the_shards():
    samples = radiology_samples(images((1, "a", 5, "PA")), ExtractConfig()).samples
    assert samples.schema == image_sample_schema()
    shard = samples.drop("path").to_arrow().add_column(0, "cxr", pl.Series([b"jpeg"]).to_arrow())
    cast = shard.select(SHARD_SCHEMA.names).cast(SHARD_SCHEMA)
    assert cast.schema == SHARD_SCHEMA


def test_subjects_keep_their_split():
    cxr = images(*((subject, f"d{subject}", 1, "AP") for subject in range(200)))
    config = ExtractConfig(split=Split(seed=4))
    samples = radiology_samples(cxr, config).samples
    expected = assign_split(samples["subject_id"], config.split)
    assert samples["split"].to_list() == expected.to_list()
    assert set(samples["split"]) == {"train", "val", "test"}

    given = pl.DataFrame({"subject_id": [5, 6, 6], "split": ["test", "val", "val"]})
    moved = dict(radiology_samples(cxr, config, given).samples.select("subject_id", "split").rows())
    assert (moved[5], moved[6]) == ("test", "val")
    assert len(moved) == 200


@pytest.mark.parametrize("hours", [47.9999, 48.0])
def test_availability_never_exceeds_the_prediction_time(hours):
    cxr = images((1, "a", hours, "AP"))
    paired = pair_images(stays((1, 10, 0, 99)), cxr, TASKS["mortality"], ExtractConfig())
    assert (paired.images["cxr_available_at"] <= START + timedelta(hours=48)).all()
    assert paired.images.height == 1
