"""The pipeline's sanity checks: the columns, the bins, and that the future does not reach back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pytest

from data.extraction import extract_partition
from data.schema import CHANNELS, FEATURE_NAMES, N_CHANNELS
from data.series import expand
from data.switches import ExtractConfig
from data.tasks import task_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

HEART_RATE, SPO2 = 220045, 220277
HR = [channel.name for channel in CHANNELS].index("Heart Rate")


def series_of(samples: pl.DataFrame) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (np.asarray(values, np.float32).reshape(-1, 17), np.asarray(mask).reshape(-1, 17))
        for values, mask in samples.select("ehr", "ehr_observed").rows()
    ]


def heart_rates(
    tables: Mapping[str, pl.DataFrame], task: str = "mortality", **switches: object
) -> tuple[np.ndarray, np.ndarray]:
    config = ExtractConfig.model_validate(switches)
    ((values, observed),) = series_of(extract_partition(tables, task_spec(task), config).samples)
    return values[:, HR], observed[:, HR]


@pytest.mark.parametrize("release", ["iii", "iv"])
def test_every_bin_has_one_level_of_each_categorical_channel(
    release: str, demo_tables: Callable[[str], Mapping[str, pl.DataFrame]]
) -> None:
    samples = extract_partition(
        demo_tables(release), task_spec("phenotyping"), ExtractConfig()
    ).samples
    assert len(FEATURE_NAMES) == 76
    blocks = [
        [i for i, name in enumerate(FEATURE_NAMES) if name.startswith(f"{channel.name}->")]
        for channel in CHANNELS
        if channel.levels
    ]
    seen = np.zeros(76)
    for values, observed in series_of(samples):
        columns = expand(values, observed)
        assert columns.shape == (len(values), 76)
        assert np.isfinite(columns).all()
        assert set(np.unique(columns[:, 76 - N_CHANNELS :])) <= {0.0, 1.0}
        for block in blocks:
            assert (columns[:, block].sum(axis=1) == 1).all()
        seen += columns.any(axis=0)
    assert (seen > 0).sum() > 60


def test_48_hours_are_48_or_24_bins(tiny: Callable[..., dict[str, pl.DataFrame]]) -> None:
    tables = tiny([{"hour": 1.5, "item": HEART_RATE, "value": "70"}])
    assert len(heart_rates(tables)[0]) == 48
    assert len(heart_rates(tables, timestep_hours=2.0)[0]) == 24
    assert len(heart_rates(tables, task="phenotyping")[0]) == 60


@pytest.mark.parametrize(
    ("hour", "bin_of_it"), [(0.0, 0), (0.5, 0), (1.0, 0), (1.001, 1), (47.5, 47), (48.0, 47)]
)
def test_a_bin_is_open_below_and_closed_above(
    hour: float, bin_of_it: int, tiny: Callable[..., dict[str, pl.DataFrame]]
) -> None:
    values, observed = heart_rates(tiny([{"hour": hour, "item": HEART_RATE, "value": "99"}]))
    assert observed.nonzero()[0].tolist() == [bin_of_it]
    assert (values[:bin_of_it] == 86).all()
    assert (values[bin_of_it:] == 99).all()


def test_the_later_of_two_in_a_bin_is_kept(tiny: Callable[..., dict[str, pl.DataFrame]]) -> None:
    events = [
        {"hour": 3.9, "item": HEART_RATE, "value": "61"},
        {"hour": 3.1, "item": HEART_RATE, "value": "140"},
    ]
    for rows in (events, events[::-1]):
        values, observed = heart_rates(tiny(rows))
        assert values[3] == 61
        assert observed.sum() == 1


@pytest.mark.parametrize("hour", [-0.1, 48.001, 49.0, 59.0])
def test_nothing_outside_the_window_counts(
    hour: float, tiny: Callable[..., dict[str, pl.DataFrame]]
) -> None:
    inside = [{"hour": 47.5, "item": HEART_RATE, "value": "99"}]
    alone = heart_rates(tiny(inside))
    both = heart_rates(tiny([*inside, {"hour": hour, "item": HEART_RATE, "value": "150"}]))
    np.testing.assert_array_equal(alone, both)
    outside_only = tiny([{"hour": hour, "item": HEART_RATE, "value": "150"}])
    result = extract_partition(outside_only, task_spec("mortality"), ExtractConfig())
    assert result.samples.is_empty()


@pytest.mark.parametrize("release", ["iii", "iv"])
def test_later_values_never_change_earlier_bins(
    release: str, demo_tables: Callable[[str], Mapping[str, pl.DataFrame]]
) -> None:
    tables = dict(demo_tables(release))
    spec, config = task_spec("phenotyping_48h"), ExtractConfig()
    border = pl.duration(hours=12)
    intime = tables["icustays"].select("stay_id", "intime")
    events = tables["events"].join(intime, on="stay_id", how="left")
    later = (pl.col("charttime") > pl.col("intime") + border).fill_null(value=False)
    shuffled = events.with_columns(
        pl.when(later)
        .then(pl.col("value").shuffle(seed=3).over("itemid"))
        .otherwise("value")
        .alias("value")
    ).drop("intime")
    labs_kept = shuffled.filter(pl.col("stay_id").is_not_null())
    after = extract_partition({**tables, "events": labs_kept}, spec, config).samples
    same_rows = extract_partition(
        {**tables, "events": tables["events"].filter(pl.col("stay_id").is_not_null())}, spec, config
    ).samples
    changed = 0
    for (old, old_mask), (new, new_mask) in zip(
        series_of(same_rows), series_of(after), strict=True
    ):
        np.testing.assert_array_equal(old[:12], new[:12])
        np.testing.assert_array_equal(old_mask[:12], new_mask[:12])
        changed += int((old[12:] != new[12:]).any())
    assert changed > 30
