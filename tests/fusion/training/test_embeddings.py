"""A frozen image encoder runs once per image, whatever many runs, workers and epochs ask for it."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import InputError
from fusion.training import embeddings, loop
from fusion.training.embeddings import Shelf

FROZEN = {"lr": 1e-3, "group_lr": {"cxr_encoder": 0}}
CHUNK = 64
RUNS = {
    "drfuse": {"world": 2, "model": "drfuse"},
    "zero3": {"world": 2, "strategy": "zero3"},
}


def job(harness, folder, name, **block):
    block = {"model": "medfuse", "optim": FROZEN, "options": {"dropout": 0.0}, **block}
    return harness.Job(folder=str(folder / name / "run"), out=str(folder / name / "out"), **block)


@pytest.fixture
def train(harness, tmp_path):
    """`train(name, cache=..., **block)`: a run in this process; losses, scores, counts, event."""

    def run(name, *, cache="cache", **block):
        kept = {"embeddings": str(tmp_path / cache)} if cache else {}
        made = harness.session(job(harness, tmp_path, name, strategy="single", **kept, **block))
        layers = harness.Layers(made.strategy.model)
        loop.fit(made)
        lines = made.log.lines
        losses = [line["values"]["loss"] for line in lines if line["kind"] == "train"]
        scores = [line["values"]["auroc"] for line in lines if line["kind"] == "val"]
        events = [line["values"] for line in lines if line["values"].get("event") == "embeddings"]
        counts = [(event["computed"], event["damaged"]) for event in events]
        return losses, scores, layers, counts

    return run


@pytest.fixture
def distinct(harness):
    """Images of the rows that every run trains on and is scored by."""
    rows = [*harness.dataset(17), *harness.dataset(10)]
    return sum(row["has_cxr"] for row in rows)


def close(one, other):
    np.testing.assert_allclose(one, other, atol=1e-6, rtol=0)


def test_a_second_run_reads_what_the_first_one_computed(train, distinct):
    losses, scores, layers, counts = train("plain", cache=None)
    assert layers.images > 2 * distinct
    assert counts == []
    first = train("first")
    close(first[0], losses)
    close(first[1], scores)
    assert first[2].images == distinct
    second = train("second")
    assert second[:2] == first[:2]
    assert second[2].calls == 0
    assert second[3] == [(0, 0)]
    other = train("other-values", optim={**FROZEN, "lr": 5e-3}, train={"accumulation": 3})
    assert other[2].calls == 0, "shared: the encoder is the same"
    assert other[0] != first[0]
    assert train("other-encoder", seed=4)[2].images == distinct


def test_another_precision_or_memory_format_has_outputs_of_its_own(train):
    assert train("fp32")[3] != [(0, 0)]
    for block in ({"precision": "bf16"}, {"channels_last": True}):
        plain, *_ = train("plain", cache=None, train=block)
        first, _, _, counts = train("first", train=block)
        assert counts != [(0, 0)]
        second, _, layers, _ = train("second", train=block)
        assert first == second
        assert layers.calls == 0
        np.testing.assert_allclose(first, plain, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def outcomes(harness, train_jobs, tmp_path_factory):
    """Runs of two workers without a cache, and with one, twice."""
    root = tmp_path_factory.mktemp("embeddings")
    blocks = {}
    for name, block in RUNS.items():
        cached = {**block, "embeddings": str(root / f"cache-{name}")}
        blocks |= {f"{name}-plain": block, f"{name}-first": cached, f"{name}-second": cached}
    jobs = [job(harness, root, name, **block) for name, block in blocks.items()]
    return dict(zip(blocks, train_jobs(root, jobs), strict=True))


def encoded(outcome):
    """Calls of the encoder's convolutions, and images that went into its first, of all workers."""
    counts = [result["encoder"] for result in outcome.results]
    return sum(each["calls"] for each in counts), sum(each["images"] for each in counts)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_two_workers_compute_each_output_once_between_them(outcomes, run, distinct):
    plain, first, second = (outcomes[f"{run}-{which}"] for which in ("plain", "first", "second"))
    assert len(plain.curve()) == 6
    for cached in (first, second):
        assert cached.codes == [0, 0], cached.stderr[-3000:]
        close(cached.curve(), plain.curve())
        close(cached.scores(), plain.scores())
        assert cached.weights[0].keys() == plain.weights[0].keys()
        for name, value in plain.weights[0].items():
            if name.startswith("cxr_encoder"):
                assert torch.equal(cached.weights[0][name], value), name
    towers = 2 if run == "drfuse" else 1
    assert encoded(plain)[1] > 2 * distinct * towers
    assert encoded(first)[1] == distinct * towers
    assert encoded(second) == (0, 0)


def test_an_encoder_that_is_trained_is_refused(harness, tmp_path):
    trained = job(
        harness,
        tmp_path,
        "one",
        optim={"group_lr": {"cxr_encoder": 0, "cxr_encoder.layer4": 1e-3}},
        train={"cache_embeddings": True},
        strategy="single",
    )
    with pytest.raises(InputError, match=r"optim\.group_lr\.cxr_encoder=0, or train\.cache_embed"):
        harness.session(trained)


def test_a_damaged_file_is_found_and_computed_again(train, tmp_path, caplog):
    losses, _, whole_run, counts = train("one")
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert counts == [(len(files), 0)]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    whole = files[0].read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 16
    for number, torn in enumerate(
        (bytes(flipped), whole[:-8], whole[:5], b"", files[1].read_bytes())
    ):
        files[0].write_bytes(torn)
        caplog.clear()
        again, _, layers, counts = train(f"again-{number}")
        assert again == losses
        assert 0 < layers.images < whole_run.images
        assert counts == [(1, 1)]
        assert f"{files[0]}: damaged" in caplog.text
        assert files[0].read_bytes() == whole


def test_shards_without_images_are_refused_and_a_split_without_them_is_not(
    harness, train, monkeypatch
):
    assert train("one", images=())[2].images > 0, "the validation split has some"
    made = harness.dataset
    monkeypatch.setattr(harness, "dataset", lambda *given, **_: made(*given, images=()))
    with pytest.raises(InputError, match=r"cache_embeddings: no row of .* has an image"):
        train("none")


def test_a_full_disk_is_named_and_leaves_nothing_torn(train, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        InputError, match=r"No space left.*data\.batches\.cache_dir to another disk"
    ):
        train("one")
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [".lock"]


def outputs_of(rows):
    return torch.from_numpy(np.stack([rows, rows**2], 1).astype(np.float32))


def test_files_that_another_process_is_computing_are_left_to_it(tmp_path, monkeypatch):
    rows = np.arange(5, 905, 2)
    folder = tmp_path / "key"
    folder.mkdir()
    other = textwrap.dedent(
        f"""
        import fcntl, sys
        handle = open({str(folder / ".lock")!r}, "w")
        fcntl.lockf(handle, fcntl.LOCK_EX, 1, 2)
        print("held", flush=True)
        sys.stdin.readline()
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", other], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        asked = []

        def compute(chunks):
            # Asked for ahead, as decoding processes do.
            for chunk in list(chunks):
                asked.append(int(chunk[0]))
                yield outputs_of(chunk)

        waits = []

        def wait(seconds):
            waits.append(list(asked))
            if process.poll() is None:
                process.stdin.close()
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

        monkeypatch.setattr(embeddings.time, "sleep", wait)
        shelf = Shelf(folder, rows, CHUNK, 0.5)
        found = shelf.outputs(compute)
    finally:
        process.kill()
        process.wait()
    assert torch.equal(found, outputs_of(rows))
    firsts = [int(rows[place]) for place in range(0, len(rows), CHUNK)]
    assert waits[0] == [*firsts[4:], *firsts[:2], firsts[3]], "from its start on, but not the third"
    assert asked == [*waits[0], firsts[2]]
    assert shelf.computed == len(firsts)
    with (folder / ".lock").open("w") as handle:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
