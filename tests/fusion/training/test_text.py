"""The note model through the loop: every strategy alike, and its base left where it was read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from data.errors import InputError
from fusion import registry
from fusion.adapters import peft_name, read_adapter, write_adapter
from fusion.training import checkpoint
from fusion.training.references import fill

STRATEGIES = {
    "single": ("single", 1),
    "ddp-2": ("ddp", 2),
    "zero2-2": ("zero2", 2),
    "zero3-2": ("zero3", 2),
}
EXACT = {
    "rows": 16,
    "silent": (),
    "options": {"loss": "bce"},
    "train": {"epochs": 3, "tokens_per_pass": 48},
}
OPTIM = {"lr": 1e-2, "name": "adamw", "group_lr": {"head": 2e-2}, "clip_norm": 1.0}


@pytest.fixture(scope="module")
def job(harness, bases, tmp_path_factory):
    """`job(name, family, strategy, **more)`: a run of the note model on a tiny base."""
    root = tmp_path_factory.mktemp("text")

    def make(name, family="llama", strategy="single", *, folder=None, options=None, **more):
        kind, world = STRATEGIES[strategy]
        defaults = {
            "backbone": str(bases[family]),
            "random_weights": False,
            "adapter": "lora",
            "rank": 4,
            "adapter_dropout": 0.0,
            "base_precision": "fp32",
            "max_length": 64,
        }
        return harness.Job(
            folder=str(root / (folder or name) / "run"),
            out=str(root / name / "out"),
            model="note_llm",
            strategy=kind,
            world=world,
            options={**defaults, **(options or {})},
            optim=OPTIM,
            **{"train": {"epochs": 2, "tokens_per_pass": 48}, **more},
        )

    return make


PACKED = {"layout": "packed"}
BERT = {"adapter": "full"}


@pytest.fixture(scope="module")
def outcomes(job, train_named):
    """One worker, padded; two workers that shard everything, packed, stopped in between."""
    name = "packed-zero3-2"
    return train_named(
        {
            "single": job("single"),
            f"{name}-stopped": job(
                f"{name}-stopped", strategy="zero3-2", options=PACKED, folder=name, stop_at=4
            ),
            name: job(name, strategy="zero3-2", options=PACKED, folder=name),
        }
    )


@pytest.fixture(scope="module")
def others(job, train_named, large):
    jobs = {
        "whole": job("whole", train={"epochs": 2, "tokens_per_pass": None}),
        "bert": job("bert", "bert", options=BERT),
        "bert-zero3-2": job("bert-zero3-2", "bert", "zero3-2", options={**BERT, **PACKED}),
        "dora": job("dora", options={"adapter": "dora"}),
        "dora-zero2-2": job("dora-zero2-2", strategy="zero2-2", options={"adapter": "dora"}),
        "rslora": job("rslora", options={"adapter": "rslora"}),
        "rslora-zero3-2": job("rslora-zero3-2", strategy="zero3-2", options={"adapter": "rslora"}),
    }
    for name in STRATEGIES:
        # One rate for all parameters, as the Trainer has it.
        jobs[f"exact-{name}"] = job(f"exact-{name}", strategy=name, **EXACT)
        jobs[f"exact-{name}"].optim = {**OPTIM, "group_lr": {}, "weight_decay": 0.1}
    options = {"backbone": str(large), "base_precision": "bf16"}
    for name in ("zero3-2", "ddp-2"):
        jobs[f"large-{name}"] = job(f"large-{name}", strategy=name, options=options, measure=True)
    return train_named(jobs)


def assert_same(several, single, before=()):
    assert several.codes == [0] * several.job.world, several.stderr[-3000:]
    assert len(single.curve()) == 6
    assert single.curve()[-1] < 0.9 * single.curve()[0]
    np.testing.assert_allclose([*before, *several.curve()], single.curve(), atol=1e-5, rtol=0)
    np.testing.assert_allclose(several.scores()[-1], single.scores()[-1], atol=1e-5)
    for weights in several.weights:
        for key, value in single.weights[0].items():
            # A key's bias adds the same to every place of a softmax: its gradient is rounding.
            if not key.endswith("key.bias"):
                torch.testing.assert_close(weights[key], value, atol=1e-4, rtol=1e-3)


def test_sharded_packed_and_resumed_it_trains_as_one_worker_does(outcomes):
    """Micro-batches differ in number between the two workers: rows are grouped by their tokens."""
    stopped = outcomes["packed-zero3-2-stopped"]
    assert stopped.results[0]["ending"] == "interrupted", stopped.stderr[-3000:]
    assert_same(outcomes["packed-zero3-2"], outcomes["single"], before=stopped.curve())


@pytest.mark.slow
def test_every_cut_of_a_step_trains_alike(others, outcomes):
    assert_same(others["whole"], outcomes["single"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "alone"),
    [("bert-zero3-2", "bert"), ("dora-zero2-2", "dora"), ("rslora-zero3-2", "rslora")],
)
def test_every_family_and_adapter_trains_alike(others, outcomes, name, alone):
    assert_same(others[name], others[alone])
    assert others[alone].curve() != outcomes["single"].curve()


def stored(folder, kind):
    newest = max((folder / "checkpoints").glob("step-*"))
    parts = [load_file(path) for path in newest.glob(f"rank-*/{kind}.safetensors")]
    return {key: value for part in parts for key, value in part.items()}


@pytest.fixture
def model(bases, harness):
    """The model of a job, as its config builds it anew."""

    def make(outcome, **options):
        kind = registry.get("note_llm")
        config = kind.Config(name="note_llm", **{**outcome.job.options, **options})
        return kind(config, harness.SPEC)

    return make


def test_checkpoints_hold_what_is_trained_and_name_the_base(outcomes, model):
    """Sharded over two workers: every adapter whole, none of them nothing, and no base."""
    outcome = outcomes["packed-zero3-2"]
    fresh = model(outcome)
    trained = {name: p.shape for name, p in fresh.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2 + 1
    folder = Path(outcome.job.folder)
    best, meta = checkpoint.read_weights(folder / "best")
    for weights in (best, stored(folder, "weights")):
        assert {name: value.shape for name, value in weights.items()} == trained
        assert all(value.norm() > 0 for value in weights.values())
    reference = meta["referenced"]["text"]
    assert reference["sha256"] == fresh.references()["text"].digest()
    assert set(reference["names"]) == fresh.state_dict().keys() - trained.keys()


def test_best_weights_predict_what_the_run_did_and_refuse_another_base(
    outcomes, model, make_base, harness
):
    outcome = outcomes["packed-zero3-2"]
    best, meta = checkpoint.read_weights(Path(outcome.job.folder) / "best")
    restored, fresh = model(outcome).eval(), model(outcome).eval()
    fill(restored, best, meta)
    batch = harness.collate(harness.dataset(10, 32, seed=5))
    assert (restored(batch).logits - fresh(batch).logits).abs().max() > 0.1
    with torch.no_grad():
        loss = harness.Task(harness.SPEC).loss(restored(batch).logits, batch).sum / 10
    lines = [line for line in outcome.results[0]["lines"] if line["kind"] == "val"]
    chosen = [line["values"]["loss"] for line in lines if line["values"]["best"]][-1]
    assert float(loss) == pytest.approx(chosen, abs=1e-5)
    other = model(outcome, backbone=str(make_base("llama", seed=1)))
    with pytest.raises(InputError, match=r"model\.backbone: these weights were trained on .*llama"):
        fill(other, best, meta)
    with pytest.raises(InputError, match=r"lack 'head\.weight'"):
        fill(fresh, {name: value for name, value in best.items() if name != "head.weight"}, meta)


def test_adapters_of_a_sharded_run_are_read_back_from_pefts_layout(
    outcomes, model, harness, tmp_path
):
    outcome, labels = outcomes["packed-zero3-2"], harness.SPEC.labels
    best, meta = checkpoint.read_weights(Path(outcome.job.folder) / "best")
    restored, fresh = model(outcome).eval(), model(outcome).eval()
    fill(restored, best, meta)
    write_adapter(tmp_path / "adapter", best, restored.text, labels)
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * 7 * 2 + 1
    read = read_adapter(tmp_path / "adapter", fresh.text, labels)
    fresh.load_state_dict(read, strict=False)
    batch = harness.collate(harness.dataset(10, 32, seed=5))
    with torch.no_grad():
        assert torch.equal(fresh(batch).logits, restored(batch).logits)


def test_a_run_on_another_base_is_refused(outcomes, harness, job, make_base):
    outcome = outcomes["single"]
    elsewhere = {**outcome.job.options, "backbone": str(make_base("llama", seed=1))}
    resumed = job("other", folder="single", options=elsewhere, train={"epochs": 3})
    with pytest.raises(InputError, match="these weights were trained on"):
        harness.loop.fit(harness.session(resumed))
    started = job("started", options=elsewhere, init_from={"": outcome.job.folder})
    with pytest.raises(InputError, match="these weights were trained on"):
        harness.loop.fit(harness.session(started))


def test_what_was_read_is_in_the_log(outcomes):
    train = [line["values"] for line in outcomes["single"].results[0]["lines"]]
    texts = sum(values.get("text_texts", 0) for values in train)
    assert texts == 2 * sum(row % 8 != 5 for row in range(17))


@pytest.fixture(scope="module")
def trainer_losses(others, harness, tmp_path_factory):
    """Losses of transformers' Trainer on the same rows in the same order, from the same weights."""
    from peft import get_peft_model, set_peft_model_state_dict
    from transformers import (
        AutoModelForSequenceClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    ours = others["exact-single"].job
    made = harness.session(replace(ours, folder=str(tmp_path_factory.mktemp("ours"))))
    text = made.strategy.model.text
    model = AutoModelForSequenceClassification.from_pretrained(
        ours.options["backbone"], num_labels=3, problem_type="multi_label_classification"
    )
    model.config.pad_token_id = text.tokenizer.pad_id
    more = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    model = get_peft_model(model, text.adapter_config(**more))
    initial = {
        peft_name(name, text): value.clone()
        for name, value in made.strategy.model.named_parameters()
        if value.requires_grad
    }
    found = set_peft_model_state_dict(model, initial)
    assert not found.unexpected_keys
    order = [row for epoch in range(3) for batch in made.train.epoch(epoch) for row in batch.rows]
    rows = {row["row"]: row for row in made.train.rows}
    examples = [
        {
            "input_ids": list(text.tokens(rows[row]["note"], "").ids),
            "labels": rows[row]["targets"].tolist(),
        }
        for row in order
    ]
    tokenizer = text.tokenizer._tokenizer
    tokenizer.pad_token = text.tokenizer.pad_token
    losses = []
    model.register_forward_hook(lambda module, inputs, output: losses.append(output.loss.item()))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path_factory.mktemp("trainer")),
            per_device_train_batch_size=8,
            num_train_epochs=1,
            learning_rate=1e-2,
            weight_decay=0.1,
            max_grad_norm=1.0,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=examples,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    return losses


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STRATEGIES)
def test_losses_are_those_of_transformers_own_trainer(others, trainer_losses, name):
    ours = others[f"exact-{name}"]
    assert ours.codes == [0] * ours.job.world, ours.stderr[-3000:]
    assert len(trainer_losses) == 6
    assert trainer_losses[-1] < 0.9 * trainer_losses[0]
    np.testing.assert_allclose(ours.curve(), trainer_losses, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def large(bases, tmp_path_factory):
    """A llama of 1 GiB in bf16, in a file for each layer."""
    folder = tmp_path_factory.mktemp("large")
    config = AutoConfig.from_pretrained(
        bases["llama"],
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=32,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
    )
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bases["llama"] / name, folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModel.from_config(config).named_parameters()}
    files: dict[str, dict] = {}
    for name, shape in shapes.items():
        part = name.split(".")[1] if name.startswith("layers") else "rest"
        values = torch.full(shape, 0.01, dtype=torch.bfloat16)
        files.setdefault(f"model-{part}.safetensors", {})[name] = values
    places = {}
    for file, tensors in files.items():
        save_file(tensors, folder / file)
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert 2 * sum(shape.numel() for shape in shapes.values()) >= 2**30
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_a_sharded_base_is_never_whole_on_a_worker(others):
    """Resident memory above the imports, while it is built and once training could begin."""
    sharded, whole = (others[f"large-{name}"].results for name in ("zero3-2", "ddp-2"))
    share = 1024 / 2
    for rank in sharded:
        assert share < rank["peak"] <= share * 4 / 3, sharded
        assert share < rank["held"] <= share * 4 / 3, sharded
    assert all(rank["peak"] > 1.5 * share for rank in whole), "whole on each"
