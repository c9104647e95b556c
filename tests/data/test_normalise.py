from __future__ import annotations

import errno
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import kept
from data.batches import BatchConfig
from data.errors import InputError
from data.files import sha256_json
from data.normalise import PUBLISHED, Normalizer, fit, fitted, load, normalizer_for
from data.reader import ShardReader
from data.schema import CHANNELS, CONTINUOUS, FEATURE_NAMES
from data.series import expand


@pytest.fixture
def reader(make_shards, tmp_path):
    make_shards(tmp_path / "s", rows=50, task="phenotyping", image_size=64, hours=30)
    return ShardReader(tmp_path / "s", tmp_path / "c")


def _values(rng, bins):
    values = np.zeros((bins, 17), np.float32)
    for v, channel in enumerate(CHANNELS):
        count = len(channel.levels)
        values[:, v] = rng.integers(count, size=bins) if count else rng.normal(90, 30, bins)
    return values


def test_fitted_on_all_bins_of_the_train_split_only(reader, tmp_path):
    """Sanity 9, against numpy on the train rows read straight from the shards."""
    table = pa.concat_tables(
        [pq.read_table(tmp_path / "s" / file.name) for file in reader.manifest.files]
    ).to_pylist()
    bins = np.concatenate(
        [np.reshape(row["ehr"], (-1, 17)) for row in table if row["split"] == "train"]
    )[:, list(CONTINUOUS)]
    normalizer = fit(reader, reader.rows_of("train"))
    np.testing.assert_allclose(normalizer.means, bins.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(normalizer.stds, bins.std(axis=0, ddof=1), rtol=1e-12)
    everyone = fit(reader, np.arange(len(reader)))
    assert everyone.means != normalizer.means


def test_the_order_of_rows_and_of_shards_changes_no_bit(reader, make_shards, tmp_path):
    rows = reader.rows_of("train")
    shuffled = np.random.default_rng(0).permutation(rows)
    assert fit(reader, shuffled) == fit(reader, rows)
    make_shards(
        tmp_path / "reversed",
        rows=50,
        task="phenotyping",
        image_size=64,
        hours=30,
        edit=lambda rows: rows.reverse(),
    )
    other = ShardReader(tmp_path / "reversed", tmp_path / "c")
    assert fit(other, other.rows_of("train")) == fit(reader, rows)


def test_a_constant_channel_has_the_floor_as_deviation(make_shards, tmp_path):
    def edit(rows):
        for row in rows:
            row["ehr"].reshape(-1, 17)[:, 8] = 86.0

    make_shards(tmp_path / "s", rows=12, image_size=64, edit=edit)
    reader = ShardReader(tmp_path / "s", tmp_path / "c")
    normalizer = fit(reader, reader.rows_of("train"))
    place = CONTINUOUS.index(8)
    assert normalizer.means[place] == 86.0
    assert normalizer.stds[place] == 1e-7


def test_only_the_twelve_numeric_columns_change():
    """Sanity 1: masks and one-hot levels are left as they are, each block sums to 1."""
    rng = np.random.default_rng(0)
    values, observed = _values(rng, 40), (rng.random((40, 17)) < 0.5).astype(np.uint8)
    features = expand(values, observed)
    before = features.copy()
    PUBLISHED.apply(features)
    numeric = {channel.name for channel in CHANNELS if not channel.levels}
    for column, name in enumerate(FEATURE_NAMES):
        same = np.array_equal(features[:, column], before[:, column])
        assert same == (name not in numeric), name
    for channel in CHANNELS:
        block = [n for n, name in enumerate(FEATURE_NAMES) if name.startswith(f"{channel.name}->")]
        if channel.levels:
            assert (features[:, block].sum(axis=1) == 1).all()
    assert set(np.unique(features[:, -17:])) == {0.0, 1.0}


def test_published_values_by_hand():
    values = np.zeros((1, 17), np.float32)
    values[0, 8], values[0, 11] = 100.0, 95.0
    features = expand(values, np.ones((1, 17), np.uint8))
    PUBLISHED.apply(features)
    rate = FEATURE_NAMES.index("Heart Rate")
    assert features[0, rate] == np.float32((100.0 - 85.53853938464474) / 57.11693013941011)
    saturation = FEATURE_NAMES.index("Oxygen saturation")
    assert math.isclose(
        features[0, saturation], (95 - 104.98108350952208) / 5135.238732591619, rel_tol=1e-6
    )
    assert (rate, saturation, FEATURE_NAMES.index("pH")) == (50, 53, 58)


def test_zero_beyond_touches_only_what_lies_beyond():
    normalizer = Normalizer((0.0,) * 12, (1.0,) * 12, zero_beyond=10.0)
    values = np.zeros((1, 17), np.float32)
    values[0, list(CONTINUOUS)] = [10, -10, 10.5, -11, 3, -3, 0, 99, 1, 2, -99, 9.99]
    features = expand(values, np.ones((1, 17), np.uint8))
    normalizer.apply(features)
    columns = [FEATURE_NAMES.index(CHANNELS[v].name) for v in CONTINUOUS]
    expected = np.float32([10, -10, 0, 0, 3, -3, 0, 0, 1, 2, 0, 9.99])
    assert features[0, columns].tolist() == expected.tolist()


def test_fitted_statistics_are_kept_beside_the_shards_and_trusted_only_whole(reader):
    normalizer = fitted(reader)
    (path,) = reader.folder.glob("normalizer-*.json")
    assert reader.manifest.digest[:16] in path.name
    assert path.name.endswith("-train-corrected.json")
    assert load(path) == fitted(reader) == normalizer
    body = json.loads(path.read_text())
    body["means"][3] += 1.0
    path.write_text(json.dumps(body))
    with pytest.raises(InputError, match=r"no valid normaliser .*hash.*; delete it"):
        fitted(reader)
    del body["sha256"]
    body["means"] = body["means"][:5]
    path.write_text(json.dumps({**body, "sha256": sha256_json(body)}))
    with pytest.raises(InputError, match=r"no valid normaliser \(a normaliser has 12 .*delete it"):
        fitted(reader)


def test_the_config_chooses(reader):
    assert normalizer_for(reader, BatchConfig(normalizer="published")) == PUBLISHED
    chosen = normalizer_for(reader, BatchConfig(zero_beyond=10))
    assert chosen.means == fitted(reader).means != PUBLISHED.means
    assert chosen.zero_beyond == 10


def test_a_read_only_shard_folder_still_gives_the_same_statistics(reader, monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(kept, "write_json", refuse)
    assert fitted(reader) == fit(reader, reader.rows_of("train"))
    assert "is read-only" in caplog.text
    assert not list(reader.folder.glob("normalizer-*"))
