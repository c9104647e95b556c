from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data.batches import BatchConfig
from data.collate import Packer, to_batch
from data.normalise import PUBLISHED
from data.reader import ShardReader
from data.schema import CHANNELS, CONTINUOUS, FEATURE_NAMES

SMALL = {"resize": 64, "size": 56}


@pytest.fixture(scope="module")
def reader(make_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("collate")

    def edit(rows):
        rows[5] |= {"ehr": None, "ehr_observed": None, "ehr_available_at": None}
        rows[5]["cxr"] = next(row["cxr"] for row in rows if row["cxr"] is not None)
        rows[5] |= {"cxr_available_at": rows[5]["prediction_time"], "cxr_labels": None}

    make_shards(folder / "s", rows=24, task="phenotyping", image_size=64, hours=20, edit=edit)
    return ShardReader(folder / "s", folder / "c")


def _batch(reader, rows, withheld=None, **changes):
    config = BatchConfig(image=SMALL, **changes)
    rows = np.asarray(rows)
    mask = np.zeros(len(rows), bool) if withheld is None else np.asarray(withheld)
    packer = Packer(reader, config, PUBLISHED, train=False, seed=0)
    return to_batch(packer.pack(rows, 0, mask), reader)


def _literal(reader, row):
    """[T, 76] of one row, cell by cell."""
    tables = [pq.read_table(reader.folder / file.name) for file in reader.manifest.files]
    record = [item for table in tables for item in table.to_pylist()][row]
    if record["ehr"] is None:
        return np.zeros((1, 76), np.float32)
    values = np.reshape(record["ehr"], (-1, 17))
    observed = np.reshape(record["ehr_observed"], (-1, 17))
    out = np.zeros((len(values), 76))
    for t in range(len(values)):
        for v, channel in enumerate(CHANNELS):
            if channel.levels:
                level = channel.levels[int(values[t, v])]
                out[t, FEATURE_NAMES.index(f"{channel.name}->{level}")] = 1
            else:
                place = CONTINUOUS.index(v)
                z = (values[t, v] - PUBLISHED.means[place]) / PUBLISHED.stds[place]
                out[t, FEATURE_NAMES.index(channel.name)] = z
            out[t, FEATURE_NAMES.index(f"mask->{channel.name}")] = observed[t, v]
    return out.astype(np.float32)


def test_series_equal_the_literal_form_and_are_zero_beyond_their_length(reader):
    rows = [3, 5, 0, 17, 8]
    batch = _batch(reader, rows)
    literal = [_literal(reader, row) for row in rows]
    assert batch.lengths.tolist() == [len(series) for series in literal]
    assert batch.ehr.shape == (5, max(map(len, literal)), 76)
    assert batch.ehr.dtype == torch.float32
    for place, series in enumerate(literal):
        np.testing.assert_array_equal(batch.ehr[place, : len(series)].numpy(), series)
        assert (batch.ehr[place, len(series) :] == 0).all()


def test_a_row_without_series_has_length_one_and_is_absent(reader):
    batch = _batch(reader, [5, 2])
    assert batch.lengths[0] == 1
    assert (batch.ehr[0] == 0).all()
    assert batch.present["ehr"].tolist() == [False, True]
    alone = _batch(reader, [5])
    assert alone.ehr.shape == (1, 1, 76)


def test_only_rows_with_an_image_have_one(reader):
    rows = np.arange(len(reader))
    batch = _batch(reader, rows)
    paired = np.flatnonzero(reader.has_cxr)
    assert batch.cxr_index.tolist() == paired.tolist()
    assert batch.cxr.shape == (len(paired), 3, 56, 56)
    assert batch.present["cxr"].tolist() == reader.has_cxr.tolist()
    np.testing.assert_array_equal(batch.cxr_targets.numpy(), reader.cxr_labels[paired])
    assert (batch.cxr_targets[paired.tolist().index(5)] == 0).all()
    np.testing.assert_array_equal(batch.targets.numpy(), reader.labels)


def test_a_batch_without_any_image(reader):
    rows = np.flatnonzero(~reader.has_cxr)[:3]
    batch = _batch(reader, rows)
    assert batch.cxr.shape == (0, 3, 56, 56)
    assert batch.cxr_targets.shape == (0, 14)
    assert not batch.present["cxr"].any()


def test_padding_does_not_depend_on_the_other_rows(reader):
    together = _batch(reader, [3, 11, 0])
    for place, row in enumerate([3, 11, 0]):
        alone = _batch(reader, [row])
        length = int(alone.lengths[0])
        assert torch.equal(together.ehr[place, :length], alone.ehr[0])


def test_withheld_images_are_neither_decoded_nor_present(reader, monkeypatch):
    rows = np.flatnonzero(reader.has_cxr)[:6]
    mask = np.array([True, False, False, True, False, False])
    read = []
    image = reader.image
    monkeypatch.setattr(reader, "image", lambda row: read.append(row) or image(row))
    batch = _batch(reader, rows, mask)
    assert read == rows[~mask].tolist()
    whole = _batch(reader, rows)
    expected = whole.without("cxr", torch.from_numpy(mask))
    assert torch.equal(batch.cxr, expected.cxr)
    assert torch.equal(batch.cxr_index, expected.cxr_index)
    assert torch.equal(batch.present["cxr"], expected.present["cxr"])


def test_series_are_cut_to_their_first_bins(reader):
    whole, cut = _batch(reader, np.arange(12)), _batch(reader, np.arange(12), max_steps=6)
    assert cut.ehr.shape[1] == 6
    assert cut.lengths.tolist() == whole.lengths.clamp(max=6).tolist()
    assert torch.equal(cut.ehr, whole.ehr[:, :6])
