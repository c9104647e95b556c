"""Preset `code` gives, value by value, what the authors' released extraction wrote."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pytest

from data.cleaning import clean
from data.cohort import select_stays
from data.duplicates import one_per_time
from data.events import events_of_stays, used_events
from data.extraction import extract_partition
from data.ledger import Ledger
from data.schema import CHANNELS, FEATURE_NAMES, N_CHANNELS
from data.series import expand
from data.tasks import PHENOTYPES, task_spec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from data.switches import ExtractConfig

TASK_FILES = {"phenotyping": "phenotyping", "mortality": "in-hospital-mortality"}
US_PER_SECOND = 1_000_000


def _samples(tables: Mapping[str, pl.DataFrame], task: str, config: ExtractConfig) -> pl.DataFrame:
    return extract_partition(tables, task_spec(task), config).samples


def test_the_76_columns_have_the_released_names_and_order(golden_folder: Path) -> None:
    assert json.loads((golden_folder / "channels.json").read_text()) == list(FEATURE_NAMES)


def test_cohort_is_the_released_one(
    golden_folder: Path, golden_tables: Mapping[str, pl.DataFrame], code_config: ExtractConfig
) -> None:
    released = pl.read_csv(golden_folder / "all_stays.csv", infer_schema_length=0).sort("stay_id")
    ours = select_stays(golden_tables, code_config, Ledger()).sort("stay_id")
    assert ours.height == 27
    for column in ("subject_id", "hadm_id", "stay_id"):
        assert ours[column].to_list() == released[column].cast(pl.Int64).to_list()
    assert ours["age"].to_list() == released["age"].cast(pl.Float64).to_list()
    assert ours["sex"].to_list() == released["gender"].to_list()
    assert ours["died"].cast(pl.Int64).to_list() == (
        released["mortality_inhospital"].cast(pl.Int64).to_list()
    )
    np.testing.assert_allclose(ours["los"], released["los"].cast(pl.Float64), rtol=1e-15)
    for column in ("intime", "outtime", "admittime", "dischtime"):
        times = [datetime.strptime(t, "%Y-%m-%d %H:%M:%S") for t in released[column]]  # noqa: DTZ007
        assert ours[column].to_list() == times


@pytest.mark.parametrize("task", ["phenotyping", "mortality"])
def test_bins_masks_and_labels_are_the_released_ones(
    task: str,
    golden_folder: Path,
    golden_tables: Mapping[str, pl.DataFrame],
    code_config: ExtractConfig,
) -> None:
    released = pl.read_parquet(golden_folder / f"{TASK_FILES[task]}.parquet").sort("stay_id")
    ours = _samples(golden_tables, task, code_config).sort("stay_id")
    assert ours["stay_id"].to_list() == released["stay_id"].to_list()
    for mine, theirs in zip(
        ours.iter_rows(named=True), released.iter_rows(named=True), strict=True
    ):
        values = np.asarray(mine["ehr"], np.float32).reshape(-1, N_CHANNELS)
        observed = np.asarray(mine["ehr_observed"]).reshape(-1, N_CHANNELS)
        golden = np.asarray(theirs["values"]).reshape(-1, len(FEATURE_NAMES))
        assert len(values) == theirs["steps"]
        np.testing.assert_array_equal(expand(values, observed), golden.astype(np.float32))
        assert mine["labels"] == [float(label) for label in theirs["labels"]]


def test_normalised_values_are_the_released_ones(
    golden_folder: Path, golden_tables: Mapping[str, pl.DataFrame], code_config: ExtractConfig
) -> None:
    from data.normalise import PUBLISHED

    released = pl.read_parquet(golden_folder / "phenotyping.parquet").sort("stay_id")
    ours = _samples(golden_tables, "phenotyping", code_config).sort("stay_id")
    for mine, theirs in zip(
        ours.iter_rows(named=True), released.iter_rows(named=True), strict=True
    ):
        values = np.asarray(mine["ehr"], np.float32).reshape(-1, N_CHANNELS)
        observed = np.asarray(mine["ehr_observed"]).reshape(-1, N_CHANNELS)
        golden = np.asarray(theirs["normalised"]).reshape(-1, len(FEATURE_NAMES))
        ready = expand(values, observed)
        PUBLISHED.apply(ready)
        np.testing.assert_allclose(ready, golden, rtol=2e-6, atol=2e-6)


def test_series_are_the_released_ones_before_any_window(
    golden_folder: Path, golden_tables: Mapping[str, pl.DataFrame], code_config: ExtractConfig
) -> None:
    """Every (stay, second, variable), also before intime and after outtime, in full precision."""
    released = pl.read_parquet(golden_folder / "series.parquet")
    ledger = Ledger()
    stays = select_stays(golden_tables, code_config, ledger)
    rows = events_of_stays(
        used_events(golden_tables["events"], code_config, ledger), stays, code_config, ledger
    ).with_columns(pl.col("offset").alias("available"), subject_has_text=pl.lit(value=True))
    points = one_per_time(clean(rows, code_config, ledger), code_config, ledger)
    stay_ids = stays["stay_id"].to_numpy()[points.stay]
    ours = {
        (int(stay), int(offset), int(v)): float(number)
        for stay, offset, v, number in zip(
            stay_ids, points.offset, points.channel, points.number, strict=True
        )
    }
    golden = {}
    for row in released.iter_rows(named=True):
        offset = round(float(row["Hours"]) * 3600) * US_PER_SECOND
        for v, channel in enumerate(CHANNELS):
            text = row[channel.name]
            if text:
                number = channel.levels.index(text) if channel.levels else float(text)
                golden[(row["stay_id"], offset, v)] = float(number)
    assert len(golden) > 15_000
    assert ours.keys() == golden.keys()
    assert [key for key in golden if ours[key] != golden[key]] == []


def test_labels_are_the_released_ones(
    golden_folder: Path, golden_tables: Mapping[str, pl.DataFrame], code_config: ExtractConfig
) -> None:
    matrix = pl.read_csv(golden_folder / "phenotype_labels.csv")
    stays = pl.read_csv(golden_folder / "all_stays.csv")
    ours = dict(
        _samples(golden_tables, "phenotyping", code_config).select("stay_id", "labels").rows()
    )
    names = [name for name, _ in PHENOTYPES]
    in_matrix_order = stays["stay_id"].sort()
    for stay, row in zip(in_matrix_order, matrix.iter_rows(named=True), strict=True):
        expected = [float(row.get(name, 0)) for name in names]
        assert ours[stay] == expected
