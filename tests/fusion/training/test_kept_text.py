"""A run on kept vectors of texts: the losses of the frozen language model, which is not loaded."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data.errors import InputError
from data.tasks import TaskSpec
from fusion import registry
from fusion.encoders.text import TextEncoder
from fusion.encoders.text_store import Shelf, Store, declare, serve, text_key
from fusion.encoders.text_tokens import pairs_of
from fusion.hashed import write_hashed
from fusion.training import checkpoint, loop
from fusion.training.config import TrainConfig
from fusion.training.references import fill
from fusion.training.text_vectors import extractor_of, text_vectors

NAME = "medfuse_llm"
FROZEN = {"lr": 1e-2, "group_lr": {"text": 0}}
KEPT = {"lr": 1e-2}
PARTS = ("labs", "no_labs", "fusion", "head", "critic")
SPEC = TaskSpec(name="toy", kind="multilabel", labels=("a", "b", "c"))


@pytest.fixture(scope="module")
def options(bases):
    return {
        "backbone": str(bases["llama"]),
        "random_weights": False,
        "adapter": "lora",
        "rank": 4,
        "adapter_dropout": 0.3,
        "base_precision": "fp32",
        "max_length": 64,
    }


def build(options, **more):
    kind = registry.get(NAME)
    return kind(kind.Config(**{**kind.TINY, **options, **more}), SPEC)


def trained(folder, options, seed=7):
    """A run's folder with a model whose adapters do something."""
    torch.manual_seed(seed)
    model = build(options).eval()
    with torch.no_grad():
        for value in model.text.parameters():
            if value.requires_grad:
                value.normal_(0, 0.2)
    base = model.references()["text"]
    stored = {"source": base.source, "sha256": base.digest(), "names": sorted(base.names)}
    checkpoint.write_weights(folder / "best", model, {"referenced": {"text": stored}})
    return model


def keep(folder, model, run, batches, source="notes_and_labs"):
    """Fill a store with the vectors of batches' texts."""
    weights, meta = checkpoint.read_weights(run / "best")
    extractor = extractor_of(model.config, TrainConfig(), weights, meta)
    shelf = Shelf(declare(folder, extractor))
    pairs = [pair for batch in batches for pair in pairs_of(batch, source) if any(pair)]
    vectors, counts = text_vectors(model.text, pairs, TrainConfig(), 64)
    shelf.add([text_key(*pair) for pair in pairs], vectors, counts)
    serve(folder, [extractor], "rayfuse data embed runs/notes --out store")
    return extractor


@pytest.fixture(scope="module")
def world(harness, options, tmp_path_factory):
    """A text run, and a store of the vectors of all rows that the harness trains and validates."""
    root = tmp_path_factory.mktemp("kept")
    model = trained(root / "text", options)
    rest = {n: v.clone() for n, v in model.state_dict().items() if not n.startswith("text.")}
    save_file(rest, root / "rest.safetensors")
    rows = [harness.dataset(17, 32), harness.dataset(10, 32, seed=5)]
    keep(root / "store", model, root / "text", [harness.collate(each) for each in rows])
    return root


@pytest.fixture(scope="module")
def job(harness, world, options):
    """`job(name, kept, **more)`: the fusion on the frozen language model, or on its vectors."""

    def make(name, *, kept, **more):
        sources = dict.fromkeys(PARTS, str(world / "rest.safetensors"))
        sources |= {} if kept else {"text": str(world / "text")}
        return harness.Job(
            folder=str(world / name / "run"),
            out=str(world / name / "out"),
            model=NAME,
            options={**options, **({"embeddings": str(world / "store")} if kept else {})},
            init_from=sources,
            optim=KEPT if kept else FROZEN,
            train={"epochs": 2, "tokens_per_pass": None},
            **more,
        )

    return make


@pytest.fixture
def count_loads(monkeypatch):
    """The language models that are built, by the base they are of."""
    loads = []
    built = TextEncoder.__init__

    def init(self, options):
        loads.append(options.backbone)
        built(self, options)

    monkeypatch.setattr(TextEncoder, "__init__", init)
    return loads


def test_losses_are_those_of_the_frozen_language_model(harness, job, world, count_loads):
    lines = {}
    for kept in (False, True):
        made = harness.session(job(f"single-{kept}", kept=kept, strategy="single"))
        loop.fit(made)
        lines[kept] = made.log.lines
        assert len(count_loads) == 1, "the second run builds none"
    for kind, name in (
        ("train", "loss"),
        ("train", "all/vclub"),
        ("val", "auroc"),
        ("val", "loss"),
    ):
        frozen, kept = (
            [line["values"][name] for line in lines[which] if line["kind"] == kind]
            for which in (False, True)
        )
        assert len(frozen) >= 2
        np.testing.assert_allclose(kept, frozen, atol=1e-6, rtol=0)
    tallies = [
        [line["values"]["text_tokens"] for line in lines[which] if line["kind"] == "train"]
        for which in (False, True)
    ]
    assert tallies[0] == tallies[1]
    assert sum(tallies[0]) > 0


@pytest.mark.slow
def test_losses_are_those_of_the_frozen_language_model_on_two_workers(job, world, train_jobs):
    jobs = [job(f"ddp-{kept}", kept=kept, world=2) for kept in (False, True)]
    frozen, kept = train_jobs(world, jobs)
    assert (frozen.codes, kept.codes) == ([0, 0], [0, 0]), kept.stderr[-3000:]
    assert len(frozen.curve()) == 6
    np.testing.assert_allclose(kept.curve(), frozen.curve(), atol=1e-6, rtol=0)
    np.testing.assert_allclose(kept.scores(), frozen.scores(), atol=1e-6, rtol=0)


def test_a_row_has_the_vector_of_the_encoder(harness, world, options, make_batch):
    rows = harness.collate(harness.dataset(17, 32))
    model = build(options).eval()
    fill(model, *checkpoint.read_weights(world / "text" / "best"))
    kept = build(options, embeddings=world / "store").eval()
    with torch.no_grad():
        expected, own = (each.text_vectors(rows) for each in (model, kept))
    assert expected.abs().amax(1).gt(0.1).sum() == rows.present["notes"].sum() > 0
    assert ((own - expected).norm(dim=1) <= 1e-6 * expected.norm(dim=1)).all()
    assert not {name for name in kept.state_dict() if name.startswith("text.")}
    assert kept.passes(rows, 1) is None


def test_a_text_without_a_token_is_as_none(world, options, make_batch, tmp_path):
    model = build(options).eval()
    fill(model, *checkpoint.read_weights(world / "text" / "best"))
    notes = (" \n\0", "fever", "", "  ")
    batch = replace(make_batch(), notes=notes, lab_texts=())
    keep(tmp_path, model, world / "text", [batch])
    kept = build(options, embeddings=tmp_path).eval()
    texts = [each.text.read(batch) for each in (model, kept)]
    for of_encoder, of_store in zip(*texts, strict=True):
        assert (of_encoder is None) == (of_store is None)
    assert [text is None for text in texts[1]] == [True, False, True, True]
    available = [
        each.text.rows(read, "cpu")[1] for each, read in zip((model, kept), texts, strict=True)
    ]
    assert available[0].tolist() == available[1].tolist()


def test_texts_that_are_not_kept_are_counted_and_named_by_no_word(world, options, make_batch):
    model = build(options, embeddings=world / "store").eval()
    with pytest.raises(InputError, match="4 of a batch's 4 texts are not in it") as fault:
        model(make_batch())
    assert "run `rayfuse data embed runs/notes --out store`" in str(fault.value)
    assert "fever" not in str(fault.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "/models/another"}, r"model\.backbone: 'another' here, 'llama.*' there"),
        ({"rank": 8}, r"model\.rank: 8 here, 4 there"),
        ({"text": "notes"}, r"model\.text: 'notes' here, 'notes_and_labs' there"),
        ({"max_length": 32}, r"model\.max_length: 32 here, 64 there"),
        ({"base_precision": "bf16"}, r"model\.base_precision: 'bf16' here, 'fp32' there"),
    ],
)
def test_vectors_of_another_text_model_are_refused(world, options, change, message):
    with pytest.raises(InputError, match=message):
        build({**options, **change}, embeddings=world / "store")
    same = {"layout": "packed", "adapter_dropout": 0.0, "offline": False}
    build({**options, **same}, embeddings=world / "store")


def test_weights_trained_on_other_vectors_are_refused(harness, options, tmp_path):
    """The store serves another adapter's vectors now; the ones before are still in it."""
    rows = [harness.collate(harness.dataset(17, 32))]
    store = tmp_path / "store"
    first = trained(tmp_path / "first", options)
    before = keep(store, first, tmp_path / "first", rows)
    model = build(options, embeddings=store)
    reference = model.references()["text"]
    stored = {
        "source": reference.source,
        "sha256": reference.digest(),
        "names": [],
        "setting": reference.setting,
    }
    checkpoint.write_weights(tmp_path / "run" / "best", model, {"referenced": {"text": stored}})
    weights = checkpoint.read_weights(tmp_path / "run" / "best")
    fill(build(options, embeddings=store), *weights)
    after = keep(store, trained(tmp_path / "second", options, 8), tmp_path / "second", rows)
    assert before.key != after.key
    with pytest.raises(InputError, match=r"model\.embeddings: these weights were trained on the"):
        fill(build(options, embeddings=store), *weights)
    serve(store, [before], "command")
    fill(build(options, embeddings=store), *weights)


def test_what_decides_a_vector_is_in_the_extractor_s_key(world, options, bases, tmp_path):
    """And nothing else: neither where the base lies nor how texts are laid out."""
    kind = registry.get(NAME)
    best = checkpoint.read_weights(world / "text" / "best")

    def key(train=None, weights=best[0], meta=best[1], **more):
        config = kind.Config(**{**kind.TINY, **options, **more})
        return extractor_of(config, train or TrainConfig(), weights, meta).key

    elsewhere, other = tmp_path / "copy" / bases["llama"].name, tmp_path / "other"
    for folder in (elsewhere, other / bases["llama"].name):
        shutil.copytree(bases["llama"], folder)
    tokenizer = other / bases["llama"].name / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"use_regex": true', '"use_regex": false'))
    same = [key(backbone=str(elsewhere)), key(layout="packed"), key(adapter_dropout=0.0)]
    assert {key(), *same} == {key()}
    name = next(name for name in best[0] if "lora_B" in name)
    base = {**best[1]["referenced"]["text"], "sha256": "0" * 64}
    others = [
        key(backbone=str(tokenizer.parent)),
        key(weights={**best[0], name: best[0][name] + 1e-6}),
        key(meta={**best[1], "referenced": {"text": base}}),
        key(TrainConfig(precision="bf16")),
        key(text="labs"),
        key(max_length=32),
        key(alpha=8.0),
    ]
    assert len({key(), *others}) == 1 + len(others)


def test_a_damaged_part_is_named(harness, options, tmp_path):
    model = trained(tmp_path / "run", options)
    rows = [harness.collate(harness.dataset(17, 32))]
    extractor = keep(tmp_path / "store", model, tmp_path / "run", rows)
    (part,) = (tmp_path / "store" / extractor.key).glob("*.safetensors")
    raw = bytearray(part.read_bytes())
    raw[-1] ^= 1
    part.write_bytes(raw)
    with pytest.raises(InputError, match=rf"{part}: damaged \(its hash does not fit\); `rayfuse"):
        Store(tmp_path / "store")
    assert Shelf(part.parent).damaged.keys() == {part}
    part.unlink()
    with pytest.raises(InputError, match=r"no text is in it yet; run `rayfuse data embed"):
        Store(tmp_path / "store")
    with pytest.raises(InputError, match=r"served\.json: missing"):
        Store(tmp_path / "absent")


def test_nobody_else_may_read_a_store(world):
    for path in (world / "store").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_out_of_fold_a_row_has_the_vector_of_its_own_extractor(options, tmp_path):
    """Two rows with one text, served by different extractors."""
    store, keys = tmp_path / "store", [text_key("fever", ""), text_key("cough", "")]
    extractors = []
    for place in range(3):
        run = tmp_path / f"run-{place}"
        trained(run, options, seed=place)
        weights, meta = checkpoint.read_weights(run / "best")
        config = registry.get(NAME).Config(**{**registry.get(NAME).TINY, **options})
        extractors.append(extractor_of(config, TrainConfig(), weights, meta))
        shelf = Shelf(declare(store, extractors[-1]))
        counts = torch.ones(2, 3, dtype=torch.int32)
        shelf.add(keys, torch.full((2, 4), float(place)), counts)
    rows = [(0, keys[0], 1), (1, keys[0], 2), (2, keys[1], 0)]
    serve(store, extractors, "command", rows)
    opened = Store(store)
    assert [float(opened.find(row, key).vector[0]) for row, key, _ in rows] == [1.0, 2.0, 0.0]
    assert opened.find(1, keys[1]) is None, "that row has another text"
    assert opened.find(3, keys[0]) is None, "no extractor is known for that row"
    other = [(0, keys[0], 2), *rows[1:]]
    before = opened.served.sha256
    serve(store, extractors, "command", other)
    assert Store(store).served.sha256 != before
    (table,) = store.glob("rows-*")
    write_hashed(table, {"rows": torch.zeros(1)})
    table.write_bytes(table.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"rows-.*: damaged"):
        Store(store)
