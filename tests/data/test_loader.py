from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.batches import BatchConfig, LeaveOut
from data.errors import InputError
from data.folds import fold_of, folds_of
from data.loader import open_stream
from data.splits import subject_position

SMALL = {"resize": 64, "size": 56}
PLAIN = {**SMALL, "augment": False}


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, rows=90, task="phenotyping", image_size=64, cxr_share=0.6, hours=9)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return BatchConfig(cache_dir=tmp_path_factory.mktemp("cache"), image=SMALL)


def _stream(shards, config, *, world=1, rank=0, split="train", train=True, **changes):
    config = config.model_copy(update=changes)
    return open_stream(
        shards, split, config, batch_size=16, seed=3, train=train, rank=rank, world_size=world
    )


def _images(batch):
    """Row and pixels of each image."""
    return zip(batch.rows[batch.cxr_index].tolist(), batch.cxr, strict=True)


def _wait_until_gone(pids):
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def _same(one, other):
    assert one.rows.tolist() == other.rows.tolist()
    assert one.draws.tolist() == other.draws.tolist()
    for name in ("ehr", "lengths", "cxr", "cxr_index", "targets", "cxr_targets"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)
    for modality, mask in one.present.items():
        assert torch.equal(mask, other.present[modality])


@pytest.mark.parametrize("task", ["mortality", "phenotyping", "radiology"])
def test_every_row_of_the_split_once(make_shards, tmp_path, task):
    manifest = make_shards(tmp_path / "shards", rows=60, task=task, image_size=64)
    config = BatchConfig(cache_dir=tmp_path / "cache", image=SMALL)
    for split, count in manifest.splits.items():
        stream = _stream(tmp_path / "shards", config, split=split, train=split == "train")
        seen = [row for batch in stream.epoch(0) for row in batch.rows.tolist()]
        assert len(seen) == count
        assert sorted(seen) == stream.reader.rows_of(split).tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_row_ids_of_an_epoch_are_the_same_for_any_world_size(shards, config, world):
    """Sanity 10: each row exactly once over all ranks; the global batches never change."""
    alone = [batch.rows.tolist() for batch in _stream(shards, config).epoch(1)]
    ranks = [_stream(shards, config, world=world, rank=rank) for rank in range(world)]
    together = [
        [row for batch in batches if batch is not None for row in batch.rows.tolist()]
        for batches in zip(*(stream.epoch(1) for stream in ranks), strict=True)
    ]
    assert together == alone
    seen = sorted(row for batch in together for row in batch)
    assert seen == ranks[0].reader.rows_of("train").tolist()


@pytest.mark.parametrize(("world", "processes"), [(1, 2), (3, 0), (2, 1)])
def test_augmented_and_withheld_rows_depend_on_no_worker(shards, config, world, processes):
    alone = _stream(shards, config, withhold_cxr=0.3)
    ranks = [
        _stream(shards, config, world=world, rank=rank, withhold_cxr=0.3, processes=processes)
        for rank in range(world)
    ]
    for whole, *parts in zip(alone.epoch(2), *(s.epoch(2) for s in ranks), strict=True):
        present = [part for part in parts if part is not None]
        assert whole.rows.tolist() == [row for part in present for row in part.rows.tolist()]
        assert whole.draws.tolist() == [word for part in present for word in part.draws.tolist()]
        assert torch.equal(whole.cxr, torch.cat([part.cxr for part in present]))
        if world == 1:
            _same(whole, parts[0])
    for stream in ranks:
        stream.close()


def test_a_seek_gives_what_skipping_gives(shards, config):
    skipped = list(_stream(shards, config).epoch(4))[2:]
    for processes in (0, 1):
        stream = _stream(shards, config, processes=processes)
        sought = list(stream.epoch(4, start_step=2))
        stream.close()
        assert len(sought) == len(skipped)
        for one, other in zip(sought, skipped, strict=True):
            _same(one, other)


def test_the_short_last_batch_is_split_unevenly_and_an_empty_share_is_none(shards, config):
    sizes = [
        [0 if batch is None else len(batch) for batch in stream.epoch(0)]
        for stream in (_stream(shards, config, world=5, rank=rank) for rank in range(5))
    ]
    assert np.array(sizes).T.tolist() == [[4, 3, 3, 3, 3]] * 3 + [[2, 2, 2, 2, 2]]
    tiny = [
        open_stream(
            shards, "test", config, batch_size=15, seed=0, train=False, rank=rank, world_size=2
        )
        for rank in range(2)
    ]
    assert [[b if b is None else len(b) for b in stream.epoch(0)] for stream in tiny] == [
        [8, 1],
        [7, None],
    ]


def test_evaluation_keeps_order_pixels_and_images(shards, config):
    stream = _stream(shards, config, split="val", train=False, withhold_cxr=0.3)
    rows = np.concatenate([batch.rows for batch in stream.epoch(0)])
    assert rows.tolist() == stream.reader.rows_of("val").tolist()
    for one, other in zip(stream.epoch(0), stream.epoch(5), strict=True):
        _same(one, other)
        assert one.present["cxr"].tolist() == stream.reader.has_cxr[one.rows].tolist()


def test_augmentation_differs_between_epochs_and_rows_of_the_same_epoch_repeat(shards, config):
    stream = _stream(shards, config)
    images = {}
    for epoch in (0, 1):
        for batch in stream.epoch(epoch):
            for place, index in enumerate(batch.cxr_index.tolist()):
                images.setdefault(int(batch.rows[index]), []).append(batch.cxr[place])
    assert all(len(pair) == 2 and not torch.equal(*pair) for pair in images.values())


def test_a_rows_word_is_its_own_and_differs_between_epochs(shards, config):
    stream = _stream(shards, config)
    epochs = [
        {row: word for b in stream.epoch(epoch) for row, word in zip(b.rows, b.draws, strict=True)}
        for epoch in (0, 1)
    ]
    assert epochs[0].keys() == epochs[1].keys()
    words = [*epochs[0].values(), *epochs[1].values()]
    assert len(set(words)) == len(words) == 2 * len(epochs[0])
    other = _stream(shards, config, split="val", train=False)
    first, second = ([b.draws.tolist() for b in other.epoch(0)] for _ in range(2))
    assert first == second


def test_a_third_of_each_batch_has_its_image_withheld(shards, config):
    """DrFuse's matched training: floor(0.3 * 16) = 4 rows of each global batch of paired rows."""
    stream = _stream(shards, config, withhold_cxr=0.3, train_rows="paired")
    for batch in stream.epoch(0):
        assert int((~batch.present["cxr"]).sum()) == int(0.3 * len(batch))
        assert batch.cxr_index.tolist() == batch.present["cxr"].nonzero()[:, 0].tolist()
        assert len(batch.cxr) == len(batch.cxr_targets) == len(batch.cxr_index)


def test_unpaired_fraction_and_replacement(shards, config):
    """Sanity 15: r = 0 is paired rows only; r gives n_paired + int(r * n_unpaired) unique rows."""
    full = _stream(shards, config)
    train = full.reader.rows_of("train")
    paired = train[full.reader.has_cxr[train]]
    unpaired = len(train) - len(paired)
    for fraction in (0.0, 0.2, 0.5):
        stream = _stream(shards, config, unpaired_fraction=fraction)
        rows = np.concatenate([batch.rows for batch in stream.epoch(0)])
        assert len(rows) == len(set(rows.tolist())) == len(paired) + int(fraction * unpaired)
        assert set(paired.tolist()) <= set(rows.tolist())
    drawn = _stream(
        shards, config, train=False, unpaired_evaluation="with_replacement", unpaired_fraction=0.1
    )
    rows = np.concatenate([batch.rows for batch in drawn.epoch(0)])
    assert len(rows) == len(train)
    assert len(set(rows.tolist())) < len(train)


@pytest.mark.parametrize("processes", [0, 1])
def test_batches_without_pixels_are_the_same_but_for_them(shards, config, processes):
    whole = _stream(shards, config, withhold_cxr=0.3)
    bare = open_stream(
        shards,
        "train",
        config.model_copy(update={"withhold_cxr": 0.3, "processes": processes}),
        batch_size=16,
        seed=3,
        train=True,
        pixels=False,
    )
    for one, other in zip(whole.epoch(1), bare.epoch(1), strict=True):
        assert len(one.cxr)
        assert other.cxr.shape == (len(one.cxr), 3, 0, 0)
        _same(replace(one, cxr=other.cxr), other)
    bare.close()


@pytest.mark.parametrize("processes", [0, 2])
def test_any_rows_are_read_as_evaluation_sees_them(shards, config, processes):
    stream = _stream(shards, config, split="val", train=False, processes=processes)
    rows = stream.reader.rows_of("train")[::-3]
    asked = []

    def chunks():
        for first in range(0, len(rows), 5):
            asked.append(first)
            yield rows[first : first + 5]

    found = list(stream.read(chunks()))
    stream.close()
    assert asked == list(range(0, len(rows), 5))
    assert np.concatenate([batch.rows for batch in found]).tolist() == rows.tolist()
    plain = _stream(shards, config, train=True, image=BatchConfig(image=PLAIN).image)
    pixels = {row: image for batch in plain.epoch(0) for row, image in _images(batch)}
    images = [pair for batch in found for pair in _images(batch)]
    assert images
    for row, image in images:
        assert torch.equal(image, pixels[row]), "training without augmentation sees the same"


def test_a_fold_of_patients_is_left_out_of_training_alone(shards, config):
    def rows(split="train", train=True, **left):
        stream = _stream(shards, config, split=split, train=train, **left)
        return np.sort(np.concatenate([batch.rows for batch in stream.epoch(0)])), stream.reader

    whole, reader = rows()
    folds = [rows(leave_out=LeaveOut(fold=fold, of=3))[0] for fold in range(3)]
    left = [np.setdiff1d(whole, kept) for kept in folds]
    assert all(len(each) for each in left)
    assert np.sort(np.concatenate(left)).tolist() == whole.tolist(), "each row is left out once"
    patients = [set(reader.subjects(each)) for each in left]
    assert sum(map(len, patients)) == len(set.union(*patients)), "a patient is in one fold"
    for kept, out in zip(folds, patients, strict=True):
        assert not out & set(reader.subjects(kept))
    for split in ("train", "val"):
        every = reader.rows_of(split).tolist()
        found, _ = rows(split, train=False, leave_out=LeaveOut(fold=0, of=3))
        assert found.tolist() == every


def test_folds_are_even_and_independent_of_the_split():
    subjects = range(10_000_000, 10_020_000)
    folds = folds_of(subjects, 5)
    assert np.bincount(folds) / 20_000 == pytest.approx([0.2] * 5, abs=0.01)
    train = np.array([subject_position(each, 0) < 0.7 for each in subjects])
    assert np.bincount(folds[train]) / train.sum() == pytest.approx([0.2] * 5, abs=0.012)
    assert folds[:4].tolist() == [fold_of(each, 5) for each in subjects[:4]]


def test_a_split_without_such_rows_is_refused(make_shards, config, tmp_path):
    make_shards(tmp_path, rows=12, cxr_share=0.0)
    with pytest.raises(InputError, match="train split has no rows with an image"):
        open_stream(tmp_path, "train", config, batch_size=4, seed=0, train=True, rows="paired")
    with pytest.raises(InputError, match="val split has no rows"):
        open_stream(tmp_path, "val", config, batch_size=4, seed=0, train=False)


def test_a_killed_decoding_process_is_replaced_and_no_batch_changes(shards, config):
    expected = list(_stream(shards, config).epoch(0))
    stream = _stream(shards, config, processes=2)
    batches = stream.epoch(0)
    got = [next(batches)]
    for worker in stream._pool._workers:
        os.kill(worker._process.pid, signal.SIGKILL)
    got += batches
    stream.close()
    for one, other in zip(got, expected, strict=True):
        _same(one, other)


def test_a_process_that_keeps_dying_is_an_error_not_a_hang(shards, config, monkeypatch):
    stream = _stream(shards, config, processes=1)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="died 3 times, last with code 1"):
        next(stream.epoch(0))
    stream.close()


def test_an_abandoned_epoch_leaves_the_next_one_whole(shards, config):
    stream = _stream(shards, config, processes=2)
    abandoned = stream.epoch(0)
    next(abandoned)
    expected = list(_stream(shards, config).epoch(1))
    for one, other in zip(stream.epoch(1), expected, strict=True):
        _same(one, other)
    with pytest.raises(RuntimeError, match="newer epoch"):
        next(abandoned)
    stream.close()


def test_no_decoding_process_outlives_its_loader(shards, config):
    stream = _stream(shards, config, processes=2)
    next(stream.epoch(0))
    pids = [worker._process.pid for worker in stream._pool._workers]
    assert all(_alive(pid) for pid in pids)
    del stream
    _wait_until_gone(pids)


_ENDLESS = """
import sys, time
from pathlib import Path
from data.batches import BatchConfig, LeaveOut
from data.loader import open_stream
from data.splits import subject_position
config = BatchConfig(cache_dir=Path(sys.argv[2]), processes=2, image={"resize": 64, "size": 56})
stream = open_stream(Path(sys.argv[1]), "train", config, batch_size=16, seed=0, train=True)
batches = stream.epoch(0)
next(batches)
print(*[worker._process.pid for worker in stream._pool._workers], flush=True)
time.sleep(60)
"""


def test_decoding_processes_survive_ctrl_c_and_end_with_a_killed_worker(shards, config):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", _ENDLESS, str(shards), str(config.cache_dir)]
    worker = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in worker.stdout.readline().split()]
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    assert all(_alive(pid) for pid in pids)
    worker.kill()
    worker.communicate()
    _wait_until_gone(pids)
