"""Raw folders to shards and batches; note text stays in the shards; faults of values."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pytest
import torch

from data.batches import BatchConfig, LabColumns
from data.check import check
from data.describe import describe
from data.errors import InputError
from data.extraction import extract_partition
from data.lab_scaler import LabColumn, LabScaler, fit, fitted
from data.lab_text import read_lab_text
from data.loader import open_stream
from data.manifest import Manifest
from data.opening import open_sources
from data.pipeline import extract
from data.reader import LabValues, ShardReader
from data.schema import SCHEMA_VERSION
from data.sources.synthetic import generate
from data.switches import AdmissionConfig, ExtractConfig, Sources
from data.tasks import task_spec

if TYPE_CHECKING:
    from data.sources.synthetic import SyntheticTruth

CANARY = "Zq7CanaryXylophone"
TASK = "diagnoses"


def plant(hospital: SyntheticTruth) -> None:
    """A canary in every note, and malformed notes of all kinds."""
    path = hospital.notes / "NOTEEVENTS.csv.gz"
    notes = pl.read_csv(path, infer_schema=False)
    odd = {
        0: "",
        1: f"{CANARY} no section at all",
        2: f"Chief Complaint:\n{CANARY}\x00 null",
        3: f"Chief Complaint:\n{CANARY} 胸痛 ألم\n",
        4: f"Chief Complaint:\n{CANARY}\n" + "long words " * 1_000_000,
    }
    texts = [
        odd.get(
            row,
            text.replace("came before", f"{CANARY} came before").replace(
                "First there was", f"{CANARY} First there was"
            ),
        )
        for row, text in enumerate(notes["TEXT"])
    ]
    changed = notes.with_columns(pl.Series("TEXT", texts))
    path.write_bytes(gzip.compress(changed.write_csv().encode(), 1))


@pytest.fixture(scope="module")
def hospital(tmp_path_factory) -> SyntheticTruth:
    out = tmp_path_factory.mktemp("clinic") / "hospital"
    made = generate(
        out, patients=160, seed=5, release="mimic-iii-1.4", cxr=False, chart_events_per_stay=0
    )
    plant(made)
    return made


@pytest.fixture(scope="module")
def shards(hospital, tmp_path_factory, ray_session) -> Path:
    out = tmp_path_factory.mktemp("shards") / "diagnoses"
    sources = Sources(mimic_iii=hospital.ehr, notes=hospital.notes)
    config = ExtractConfig(partitions=2)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("data")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        extract(sources, TASK, config, out, preset="corrected")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert records
    assert not any(CANARY in record for record in records)
    return out


def test_shards_are_sound_and_notes_are_nowhere_else(shards):
    assert check(shards) == []
    manifest = Manifest.load(shards)
    assert manifest.release == "mimic-iii-1.4-synthetic"
    assert manifest.counters["notes cut to note_limit"] >= 0
    assert manifest.overlap["train"]["notes+labs"] == manifest.splits["train"] > 20
    text = describe(shards)
    assert "several visits" in text
    assert CANARY not in text
    import ray

    ray_logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    outside = [
        path
        for folder in (shards.parent, ray_logs)
        for path in folder.rglob("*")
        if path.is_file() and CANARY.encode() in path.read_bytes()
    ]
    assert all(path.parent.name == "shards" for path in outside)
    notes = pl.concat(pl.read_parquet(path) for path in (shards / "shards").glob("*.parquet"))
    assert notes["notes"].str.contains(CANARY).mean() > 0.8
    assert notes["notes"].str.len_chars().max() <= 200_000
    assert not notes["notes"].str.contains("Discharge|\x00").any()
    assert notes["subject_id"].is_duplicated().mean() > 0.5
    flagged = [read_lab_text(text) for text in notes["lab_text"].drop_nulls()]
    assert sum(map(len, flagged)) > 100


def test_a_batch_holds_texts_matrix_and_masks(shards, tmp_path):
    config = BatchConfig(cache_dir=tmp_path, labs=LabColumns(top=8))
    stream = open_stream(shards, "train", config, batch_size=8, seed=1, train=True)
    reader, seen = stream.reader, []
    for batch in stream.epoch(0):
        assert batch is not None
        seen += batch.rows.tolist()
        assert batch.labs.shape == batch.labs_observed.shape == (len(batch), 8)
        assert ((batch.labs >= 0) & (batch.labs <= 1)).all()
        assert (batch.labs[~batch.labs_observed] == 0).all()
        assert len(batch.notes) == len(batch.notes_index)
        for note, row in zip(batch.notes, batch.rows[batch.notes_index.numpy()], strict=True):
            assert note == reader.notes(np.array([row]))[0]
        assert len(batch.lab_texts) == len(batch)
        assert CANARY not in repr(batch)
        assert not batch.present["ehr"].any()
        assert torch.equal(batch.present["labs"], batch.labs_observed.any(1))
    assert sorted(seen) == reader.rows_of("train").tolist()
    fewer = batch.without("notes", torch.ones(len(batch), dtype=torch.bool))
    assert fewer.notes == ()
    assert not fewer.present["notes"].any()
    none = batch.without("labs", torch.ones(len(batch), dtype=torch.bool))
    assert not none.labs_observed.any()
    assert set(none.lab_texts) == {""}
    assert none.notes == batch.notes


def test_the_columns_are_fitted_on_train_alone_and_kept(shards, tmp_path):
    reader = ShardReader(shards, tmp_path)
    config = LabColumns(top=5)
    scaler = fitted(reader, config)
    assert fitted(reader, config) == scaler == fit(reader, reader.rows_of("train"), config)
    assert len(scaler.columns) == 5
    train = reader.lab_values(reader.rows_of("train"))
    frame = pl.DataFrame({"item": train.items, "value": train.values})
    for column in scaler.columns:
        values = frame.filter(pl.col("item") == column.item)["value"].to_numpy()
        assert column.low == pytest.approx(np.quantile(values.astype(float), 0.005))
        assert column.high == pytest.approx(np.quantile(values.astype(float), 0.995))
    (path,) = [p for p in shards.glob("labs-*.json") if '"low"' in p.read_text()][:1]
    altered = path.read_text().replace('"log": false', '"log": true', 1)
    kept = path.read_text()
    path.write_text(altered)
    try:
        from data.lab_scaler import load

        with pytest.raises(InputError, match="no valid lab columns"):
            load(path)
    finally:
        path.write_text(kept)


def test_wrong_units_empty_rows_and_outliers():
    scaler = LabScaler(
        (LabColumn("a", "mg/dl", 0.0, 10.0, False), LabColumn("b", "", 0.0, 9.0, True))
    )
    labs = LabValues(
        ["a", "b", "a", "a", "z"],
        ["mg/dl", "", "furlong", "mg/dl", "x"],
        np.array([5, 9, 5, 1e30, 1], np.float32),
        np.array([2, 0, 1, 2]),
    )
    values, observed = scaler.apply(labs)
    assert observed.tolist() == [[True, True], [False, False], [False, False], [True, False]]
    assert values.tolist() == [[0.5, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
    empty = LabValues([], [], np.zeros(0, np.float32), np.zeros(3, np.int64))
    assert not scaler.apply(empty)[1].any()


class _Reader:
    """Labs by row, as ShardReader gives them."""

    folder = "here"

    def __init__(self, rows: list[list[tuple[str, str, float]]]) -> None:
        self.rows = rows

    def lab_values(self, rows: np.ndarray) -> LabValues:
        flat = [one for row in rows for one in self.rows[row]]
        lengths = np.array([len(self.rows[row]) for row in rows])
        items, units, values = zip(*flat, strict=True)
        return LabValues(list(items), list(units), np.array(values, np.float32), lengths)


def test_constant_columns_are_left_out_and_the_usual_unit_wins():
    rows = [[("const", "u", 3.0), ("a", "mg/dl", float(k)), ("b", "x", k**4.0)] for k in range(50)]
    rows += [[("a", "mmol/l", 7.0)] for _ in range(20)]
    scaler = fit(
        _Reader(rows), np.arange(len(rows)), LabColumns(top=10, clip=(0.0, 1.0), log_skew=1.0)
    )
    assert [(c.item, c.unit, c.log) for c in scaler.columns] == [
        ("a", "mg/dl", False),
        ("b", "x", True),
    ]
    with pytest.raises(InputError, match="no lab item whose values differ"):
        fit(_Reader([[("const", "u", 3.0)]] * 5), np.arange(5), LabColumns())


def test_old_shards_are_refused_by_version(shards, tmp_path):
    text = (shards / "manifest.json").read_text()
    old = text.replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 1')
    (tmp_path / "manifest.json").write_text(old)
    with pytest.raises(InputError, match=r"of schema version 1, not .* extract again"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("sources", "settings", "needle"),
    [
        ({}, {}, "--mimic-iii, --mimic-iv or --meds"),
        ({"mimic_iii": "ehr"}, {}, "give --notes, or set .*require_notes=false"),
        ({"meds": "ehr"}, {}, "abnormal=range"),
        ({"meds": "ehr"}, {"abnormal": "range"}, "no MEDS dataset"),
        ({"mimic_iii": "ehr", "notes": "truth"}, {}, "no table of notes"),
    ],
)
def test_missing_sources_name_their_option(hospital, sources, settings, needle):
    folders = {name: getattr(hospital, folder) for name, folder in sources.items()}
    config = ExtractConfig(admissions=AdmissionConfig(**settings))
    with pytest.raises(InputError, match=needle):
        open_sources(Sources(**folders), task_spec(TASK), config)


def test_two_cohorts_are_refused(hospital):
    with pytest.raises(ValueError, match="mimic_iii and meds are both set"):
        Sources(mimic_iii=hospital.ehr, meds=hospital.ehr)


def test_values_in_another_unit_are_converted_and_odd_ones_never_stop_a_run(clinic):
    tables = clinic(4, patients=40)
    labs = tables["labs"].with_columns(
        pl.when(pl.col("item") == "51301")
        .then(float("inf"))
        .otherwise("valuenum")
        .alias("valuenum")
    )
    result = extract_partition({**tables, "labs": labs}, task_spec(TASK), ExtractConfig())
    assert result.counters["lab results converted"] > 0
    listed = result.samples["lab_items"].explode()
    assert "51301" not in listed.to_list()
    grams = result.samples.select(
        pl.col("lab_items").explode(), pl.col("lab_units").explode()
    ).filter(pl.col("lab_items") == "51222")
    assert set(grams["lab_units"]) == {"g/dl"}
