"""Kept vectors of texts: computed once, by what decides them; and the runs that read them."""

from __future__ import annotations

import json
import logging
import re
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load

from data.errors import InputError
from data.folds import fold_of
from data.reader import ShardReader
from fusion.encoders.text import TextEncoder
from fusion.encoders.text_store import Store, text_key
from fusion.training.checkpoint import read_weights, write_weights
from ray_jobs import config as run_config
from ray_jobs import embed, evaluate, export, inference, texts
from ray_jobs.embed import Settings
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = 60
CANARY = "zebraquartz"
FIGURES = re.compile(r"(\d+) present, (\d+) computed")
HERE = Settings(actors=0, tokens_per_pass=256)


def write_texts(rows: list[dict], altered: int | None = None) -> None:
    """Notes and results of admissions; rows 5, 15, ... have none to read, row 2 has row 0's."""
    words = ["fever", "chest pain", "no cough", "edema", CANARY]
    for number, row in enumerate(rows):
        known = row["prediction_time"] - timedelta(hours=1)
        row |= {name: None for name in row if name.startswith(("ehr", "cxr", "dicom", "stay"))}
        row |= {"lab_items": ["Sodium"], "lab_units": ["mEq/L"], "labs": [138.0]}
        row["labs_available_at"] = known
        if number % 10 == 5:
            continue
        source = 0 if number == 2 else number
        text = " ".join(words[(source * step) % 5] for step in range(1, 2 + source % 4))
        row["notes"] = f"{text} {source}{' again' if number == altered else ''}"
        row["notes_available_at"] = known
        if source % 3 == 0:
            row["lab_text"] = "These are abnormal results recorded: ITEMID Sodium: 128 mEq/L;"
            row["labs"] = [128.0]


@pytest.fixture(scope="module")
def shards(make_shards: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    make_shards(folder, rows=ROWS, task="diagnoses", edit=write_texts)
    return folder


@pytest.fixture
def text_run(make_run: Callable, shards: Path) -> Callable[..., Path]:
    """`text_run(weights=0, **more)`: a run of the note model; `weights` draws other ones."""

    def make(weights: int = 0, *, shards: Path = shards, model: str = "note_llm", **more: Any):
        more["batches"] = {"labs": {"top": 6}, **more.get("batches", {})}
        folder = make_run(model, shards=shards, task="diagnoses", **more)
        if weights:
            trained = inference.load(folder)
            torch.manual_seed(weights)
            with torch.no_grad():
                for value in trained.model.parameters():
                    value.add_(torch.randn_like(value), alpha=0.05)
            write_weights(folder / "best", trained.model, {"selected": "best"})
        return folder

    return make


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every text that really passes through a language model."""
    lengths: list[int] = []
    forward = TextEncoder.forward

    def counted(self: TextEncoder, texts: Any) -> torch.Tensor:
        lengths.extend(len(text.ids) for text in texts)
        return forward(self, texts)

    monkeypatch.setattr(TextEncoder, "forward", counted)
    return lengths


def distinct(shards: Path) -> int:
    reader = ShardReader(shards)
    return len({text.key for split in texts.SPLITS for text in texts.texts_of(reader, split, ALL)})


ALL = "notes_and_labs"


def vector(store: Store, reader: ShardReader, row: int) -> torch.Tensor:
    (pair,) = texts.pairs(reader, [row], ALL)
    kept = store.find(row, text_key(*pair))
    assert kept is not None
    return kept.vector


def encoded(model: Any, row: int, reader: ShardReader) -> torch.Tensor:
    """A row's text by a language model, alone in its pass."""
    with torch.no_grad():
        text = model.text.tokens(*texts.pairs(reader, [row], ALL)[0])
        return model.text([text])[0]


def test_every_row_has_the_vector_that_evaluation_gives_it(text_run, shards, tmp_path, passed):
    folder, out = text_run(), tmp_path / "store"
    done = embed.run(folder, out, settings=HERE)
    assert (done.asked, done.present, done.computed) == (distinct(shards), 0, distinct(shards))
    assert done.computed == len(passed) < ROWS - ROWS // 10
    assert done.tokens == sum(passed)
    trained, store = inference.load(folder), Store(out)
    seen = 0
    for split in texts.SPLITS:
        stream = inference.open_split(trained, split)
        found = inference.predict(trained, stream, features=True)
        for row, expected in zip(found.rows.tolist(), found.features["text"], strict=True):
            (pair,) = texts.pairs(stream.reader, [row], ALL)
            if not any(pair):
                assert row % 10 == 5
                continue
            own = store.find(row, text_key(*pair)).vector.numpy()
            assert np.linalg.norm(own - expected) <= 1e-6 * np.linalg.norm(expected)
            seen += 1
    assert seen == ROWS - ROWS // 10


def test_what_is_there_is_not_computed_again(text_run, make_shards, shards, tmp_path, passed):
    out = tmp_path / "store"
    whole = distinct(shards)
    embed.run(text_run(), out, settings=HERE)
    passed.clear()
    again = embed.run(text_run(), out, settings=HERE)
    assert (again.present, again.computed, passed) == (whole, 0, [])
    altered = tmp_path / "altered"
    make_shards(
        altered, rows=ROWS, task="diagnoses", edit=lambda rows: write_texts(rows, altered=11)
    )
    one = embed.run(text_run(shards=altered), out, settings=HERE)
    assert (one.present, one.computed, len(passed)) == (whole - 1, 1, 1)
    assert one.tokens == passed[0]
    passed.clear()
    other = embed.run(text_run(3), out, settings=HERE)
    assert (other.present, other.computed, len(passed)) == (0, whole, whole)
    passed.clear()
    longer = embed.run(text_run(options={"max_length": 32}), out, settings=HERE)
    assert (longer.present, len(passed)) == (0, whole)
    passed.clear()
    packed = embed.run(text_run(options={"layout": "packed"}), out, settings=HERE)
    assert (packed.computed, passed) == (0, [])
    assert len([path for path in out.iterdir() if path.is_dir()]) == 3


def test_only_the_texts_of_a_damaged_part_are_computed_again(text_run, tmp_path, passed, caplog):
    out, folder = tmp_path / "store", text_run()
    embed.run(folder, out, settings=HERE)
    part = sorted(out.glob("*/*.safetensors"))[0]
    raw = bytearray(part.read_bytes())
    raw[len(raw) // 2] ^= 1
    part.write_bytes(raw)
    passed.clear()
    with caplog.at_level(logging.WARNING):
        done = embed.run(folder, out, settings=HERE)
    assert f"{part}: damaged (its hash does not fit); computed again" in caplog.text
    assert 0 < done.computed == len(passed) < done.asked
    assert part.is_file()
    Store(out)


def test_no_word_of_a_text_is_kept_or_told(text_run, tmp_path, caplog):
    out = tmp_path / "store"
    with caplog.at_level(logging.DEBUG):
        done = embed.run(text_run(), out, settings=HERE)
    for path in out.rglob("*"):
        assert path.is_dir() or CANARY.encode() not in path.read_bytes()
        assert path.stat().st_mode & 0o77 == 0, path
    assert CANARY not in caplog.text + str(done)


def test_out_of_fold_a_patient_has_vectors_of_the_run_that_left_them_out(
    text_run, shards, tmp_path, passed
):
    main = text_run(9)
    folds = [text_run(1 + k, batches={"leave_out": {"fold": k, "of": 3}}) for k in range(3)]
    out = tmp_path / "store"
    done = embed.run(main, out, folds=[folds[1], folds[2], folds[0]], settings=HERE)
    assert done.computed == len(passed)
    store, reader = Store(out), ShardReader(shards)
    models = {each: inference.load(each).model.eval() for each in (main, *folds)}
    served: dict[str, set[Path]] = {}
    for split in texts.SPLITS:
        for text in texts.texts_of(reader, split, ALL):
            (subject,) = reader.subjects(np.array([text.row]))
            source = folds[fold_of(subject, 3)] if split == "train" else main
            served.setdefault(split, set()).add(source)
            own = vector(store, reader, text.row)
            expected = encoded(models[source], text.row, reader)
            assert (own - expected).norm() <= 1e-6 * expected.norm(), (split, text.row)
            if split == "train":
                assert (
                    own - encoded(models[main], text.row, reader)
                ).norm() > 1e-3 * expected.norm()
    assert served == {"train": set(folds), "val": {main}, "test": {main}}
    assert f"--fold {folds[0]} --fold {folds[1]} --fold {folds[2]}" in store.served.command
    passed.clear()
    again = embed.run(main, out, folds=folds, settings=HERE)
    assert (again.computed, passed) == (0, [])


def test_folds_that_do_not_fit_are_refused(text_run, tmp_path):
    def fold(k, of=2, **more):
        return text_run(batches={"leave_out": {"fold": k, "of": of}}, **more)

    main, first, second = text_run(), fold(0), fold(1)
    out = tmp_path / "store"
    with pytest.raises(InputError, match=r"leave_out is 0 of 2, but 1 runs by --fold must"):
        embed.run(main, out, folds=[first])
    with pytest.raises(InputError, match="is 0 of 2, but 2 runs by --fold must leave out each"):
        embed.run(main, out, folds=[first, first])
    with pytest.raises(InputError, match="is none, but 2 runs"):
        embed.run(main, out, folds=[first, main])
    with pytest.raises(InputError, match="leaves out a fold itself"):
        embed.run(first, out, folds=[first, second])
    other = fold(1, options={"max_length": 32})
    with pytest.raises(InputError, match=r"(?s)but for its fold:.*model\.max_length: 96 -> 32"):
        embed.run(main, out, folds=[first, other])
    assert not out.exists()


def test_runs_that_cannot_embed_are_refused(text_run, make_run, tmp_path):
    out = tmp_path / "store"
    with pytest.raises(InputError, match=r"model\.name=lstm reads no text"):
        embed.run(make_run("lstm"), out)
    with pytest.raises(InputError, match="no run folder"):
        embed.run(tmp_path / "absent", out)
    folder = text_run()
    embed.run(folder, out, settings=HERE)
    reader = text_run(model="medfuse_llm", options={"embeddings": str(out)})
    with pytest.raises(InputError, match=r"its own texts come from model\.embeddings"):
        embed.run(reader, tmp_path / "other")
    for wrong in ("train,dev", ""):
        with pytest.raises(InputError, match="is none of train, val, test"):
            embed.splits_of(wrong)
    _, meta = read_weights(folder / "best")
    elsewhere = {**meta, "lineage": {"manifest": "0" * 64}}
    write_weights(folder / "best", inference.load(folder).model, elsewhere)
    with pytest.raises(InputError, match=r"not the shards that .* was trained on"):
        embed.run(folder, out, settings=HERE)


def test_a_run_on_kept_vectors_is_evaluated_without_a_language_model(text_run, tmp_path, passed):
    """And one whose store lacks texts is told how many, before any worker starts."""
    out, folder = tmp_path / "store", text_run()
    embed.run(folder, out, settings=Settings(0, ("train", "val"), 256))
    reader = text_run(model="medfuse_llm", options={"embeddings": str(out)})
    texts.refuse_missing(inference.load_config(reader), ("train", "val"))
    with pytest.raises(InputError, match=r"lacks 12 of 12 texts of the test split; run `rayfuse"):
        evaluate.run(reader)
    embed.run(folder, out, settings=HERE)
    passed.clear()
    evaluate.run(reader)
    assert passed == []
    metrics = json.loads((RunFolder(reader).evaluation("test") / "metrics.json").read_text())
    assert len(metrics["labels"]) == 10
    with pytest.raises(InputError, match="only note_llm can be exported"):
        export.run(reader, tmp_path / "export")
    other = text_run(model="medfuse_llm", options={"embeddings": str(out)})
    config = inference.load_config(other)
    changed = config.model_copy(update={"model": config.model.model_copy(update={"rank": 3})})
    with pytest.raises(InputError, match=r"model\.rank: 3 here, 16 there"):
        texts.refuse_missing(changed, ("train",))


def test_settings_of_a_text_branch_that_is_not_there_are_refused():
    base = {"name": "x", "task": "diagnoses", "data": {"shards": "s"}}
    base["model"] = {"name": "medfuse_llm", "embeddings": "store"}
    assert run_config.from_dump(base).model.embeddings == Path("store")
    for place, block in (
        ("init_from.text", {"init_from": {"text": "runs/notes"}}),
        (r"optim\.group_lr\.text", {"optim": {"group_lr": {"text": 0}}}),
    ):
        with pytest.raises(ValidationError, match=f"{place}: with model.embeddings the text"):
            run_config.from_dump({**base, **block})
    folded = {"leave_out": {"fold": 2, "of": 2}}
    with pytest.raises(ValidationError, match=r"fold \(2\) must be below of \(2\)"):
        run_config.from_dump({**base, "data": {"shards": "s", "batches": folded}})


def test_a_run_s_store_is_looked_for(text_run, tmp_path):
    from ray_jobs import doctor

    out = tmp_path / "store"
    document = {
        "name": "x",
        "task": "diagnoses",
        "model": {"name": "medfuse_llm", "embeddings": str(out)},
        "data": {"shards": str(tmp_path)},
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(document), encoding="utf-8")
    told = [line for line in doctor.examine(path)[0] if str(out) in line]
    assert [line.split()[0] for line in told] == ["FAIL"]
    assert "is missing; `rayfuse data embed` fills it" in told[0]
    embed.run(text_run(), out, settings=HERE)
    told = [line for line in doctor.examine(path)[0] if str(out) in line]
    assert [line.split()[0] for line in told] == ["ok"]


def test_one_command_at_a_time_fills_a_store(text_run, tmp_path):
    out = tmp_path / "store"
    with (
        embed._alone(out),
        pytest.raises(InputError, match="is being filled by another process"),
    ):
        embed.run(text_run(), out, settings=HERE)


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_command_goes_on_where_it_was(start_head, text_run, make_shards, tmp_path):
    """By actors; what it had is not computed again, and no text passes through Ray."""
    make_shards(tmp_path / "shards", rows=700, task="diagnoses", edit=write_texts)
    folder, out = text_run(shards=tmp_path / "shards"), tmp_path / "store"
    words = ["data", "embed", str(folder), "--out", str(out)]
    with start_head(num_cpus=2) as head:
        with head.started(*words, "--tokens-per-pass", "1", RAY_ADDRESS=head.gcs) as process:
            deadline = time.monotonic() + 300
            while not list(out.glob("*/*.safetensors")):
                assert process.poll() is None, process.communicate()[1][-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
        before = {path: path.read_bytes() for path in out.glob("*/*.safetensors")}
        with pytest.raises(InputError, match=r"served\.json: missing"):
            Store(out)
        done = head.rayfuse(*words, RAY_ADDRESS=head.gcs)
        assert done.returncode == 0, done.stderr
        logs = [path.read_bytes() for path in head.folder.rglob("logs/*") if path.is_file()]
    reader = ShardReader(tmp_path / "shards")
    every = {text.key for split in texts.SPLITS for text in texts.texts_of(reader, split, ALL)}
    present, computed = (int(each) for each in FIGURES.search(done.stdout).groups())
    assert present + computed == len(every)
    assert present == sum(len(load(raw)["keys"]) for raw in before.values())
    assert 0 < present < len(every)
    assert embed.run(folder, out, settings=HERE).computed == 0
    assert {path: path.read_bytes() for path in before} == before
    store, model = Store(out), inference.load(folder).model.eval()
    for row in (0, 301, 699):
        expected = encoded(model, row, reader)
        assert (vector(store, reader, row) - expected).norm() <= 1e-6 * expected.norm()
    assert logs
    assert not [raw for raw in logs if CANARY.encode() in raw]
