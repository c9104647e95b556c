from __future__ import annotations

import pytest

from data.batches import BatchConfig
from data.loader import open_stream


@pytest.mark.parametrize("task", ["mortality", "phenotyping", "radiology"])
def test_every_row_of_the_split_once(make_shards, tmp_path, task):
    manifest = make_shards(tmp_path / "shards", rows=60, task=task, image_size=64)
    config = BatchConfig(cache_dir=tmp_path / "cache", image={"resize": 64, "size": 56})
    for split, count in manifest.splits.items():
        stream = open_stream(
            tmp_path / "shards", split, config, batch_size=16, seed=0, train=split == "train"
        )
        seen = [row for batch in stream.epoch(0) for row in batch.rows.tolist()]
        assert len(seen) == count
        assert sorted(seen) == stream.reader.rows_of(split).tolist()
