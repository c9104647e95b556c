"""`rayfuse plan`: from a YAML and its shards, or a shape, to what fits and what to take."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from data.errors import InputError
from data.tasks import task_spec
from fusion.encoders.text_base import TINY_LLAMA
from fusion.hardware import GIBI
from ray_jobs import config as run_config
from ray_jobs import plan, plan_cohort, plan_machines, plan_text
from ray_jobs.cli import app

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, rows=60, image_size=32, cxr_share=0.5, task="phenotyping", hours=8)
    return folder


@pytest.fixture
def run_yaml(shards, tmp_path):
    path = tmp_path / "run.yaml"
    document = {
        "name": "planned",
        "runs_dir": str(tmp_path / "runs"),
        "task": "phenotyping",
        "model": {"name": "lstm", "hidden": 8},
        "data": {"shards": str(shards), "batches": {"image": {"resize": 32, "size": 32}}},
        "train": {"epochs": 5, "batch_size": 8},
    }
    path.write_text(yaml.safe_dump(document))
    return path


def _described(**changes):
    given = {
        "nodes": 1,
        "gpus": 2,
        "kind": "A100",
        "gpu_memory": None,
        "node_memory": "64GiB",
        "network": 100.0,
    }
    return plan_machines.described(**{**given, **changes})


def test_the_cohort_is_read_from_manifest_and_shards(run_yaml, shards):
    (config,) = run_config.load(run_yaml)
    cohort = plan_cohort.read_cohort(config, task_spec("phenotyping"))
    manifest = json.loads((shards / "manifest.json").read_text())
    assert cohort.rows == manifest["splits"]["train"]
    assert cohort.images == pytest.approx(manifest["overlap"]["train"]["cxr"] / cohort.rows)
    assert cohort.lengths[-1] <= 8
    assert cohort.lengths[0] >= 1
    micro = cohort.micro(8, 32)
    assert len(micro.lengths) == 8
    assert micro.lengths[-1] == cohort.lengths[-1], "the longest row of all is among them"
    assert cohort.images * 8 < micro.images <= 8
    (cut,) = run_config.load(run_yaml, ["data.batches.max_steps=3"])
    assert plan_cohort.read_cohort(cut, task_spec("phenotyping")).lengths[-1] == 3
    (paired,) = run_config.load(run_yaml, ["data.batches.train_rows=paired"])
    assert plan_cohort.read_cohort(paired, task_spec("phenotyping")).images == 1


def test_a_run_is_planned_for_described_gpus(run_yaml):
    result = CliRunner().invoke(
        app, ["plan", str(run_yaml), "--gpus", "2", "--gpu-memory", "80GiB", "--arithmetic"]
    )
    assert result.exit_code == 0, result.output
    for strategy in ("ddp", "zero1", "zero2", "zero3"):
        assert strategy in result.output
    assert "take: scaling.strategy=ddp scaling.num_workers=2 train.accumulation=1" in result.output
    assert "moments" in result.output
    assert "row cache on each node" in result.output


def test_micro_batches_are_the_share_cut(run_yaml):
    (config,) = run_config.load(run_yaml, ["train.batch_size=64"])
    found = plan.plan_run(config, _described())
    sizes = {(option.cut.rows, option.layout.accumulation) for option in found.options}
    assert sizes == {(32, 1), (16, 2), (8, 4), (4, 8), (1, 32)}
    by_rows = {
        o.cut.rows: sum(o.memory.passes.values())
        for o in found.options
        if o.layout.strategy == "ddp"
    }
    assert by_rows[32] > by_rows[16] > by_rows[8]
    assert found.steps == 5 * int(np.ceil(36 / 64))


def test_nothing_fits_and_one_key_is_named(run_yaml):
    (config,) = run_config.load(run_yaml)
    whole = plan.plan_run(config, _described())
    least = min(option.device for option in whole.options)
    tight = _described(gpu_memory=str(int(0.9 * least)))
    found = plan.plan_run(config, tight)
    assert not found.best
    text = plan_text.text(found)
    assert "nothing fits" in text
    assert "GPU memory" in text
    assert found.change is None or found.change in text
    assert "take:" not in text


def test_recomputing_is_named_where_it_is_enough(monkeypatch, run_yaml):
    (config,) = run_config.load(run_yaml)
    real = plan.dry_step

    def step(factory, task, train, *rest, **options):
        found = real(factory, task, train, *rest, **options)
        size = 2 * GIBI if train.recompute else 20 * GIBI
        return plan.replace(found, working=dict.fromkeys(found.working, size))

    monkeypatch.setattr(plan, "dry_step", step)
    found = plan.plan_run(config, _described(gpu_memory="10GiB"))
    assert not found.best
    assert found.change == "train.recompute=true"
    assert "change one thing: train.recompute=true" in plan_text.text(found)


def test_a_plan_is_json_too(run_yaml):
    (config,) = run_config.load(run_yaml)
    found = plan.plan_run(config, _described())
    document = json.loads(json.dumps(plan_text.as_json(found)))
    chosen = document["options"][document["best"][0]]
    assert chosen["strategy"] == "ddp"
    assert chosen["fits"]
    assert sum(chosen["parts"].values()) <= chosen["device_bytes"]


def test_a_shape_is_planned_whole_and_with_adapters(monkeypatch):
    small = plan.known_shape("llama-3-8b")
    monkeypatch.setattr(
        plan,
        "known_shape",
        lambda name: plan.replace(small, layers=2, hidden=256, heads=4, kv_heads=2),
    )
    found = plan.plan_shape(
        "llama-3-8b",
        _described(gpus=8),
        sequence=128,
        batch=16,
        lora_rank=4,
        train=plan.shape_training("bf16", recompute=True),
    )
    assert {option.note for option in found.options} == {"full", "lora 4"}
    full, adapted = (
        next(option for option in found.options if option.note == note)
        for note in ("full", "lora 4")
    )
    assert adapted.memory.resident["moments"] < 0.1 * full.memory.resident["moments"]
    assert adapted.memory.resident["weights"] < 0.6 * full.memory.resident["weights"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan"], "name a run's YAML, or --shape"),
        (["plan", "--shape", "llama-3-8"], "did you mean 'llama-3-8b'"),
        (["plan", "--shape", "llama-3-8b", "--gpus", "8", "--gpu-kind", "G80"], "choose one of"),
        (["plan", "--shape", "llama-3-8b", "--gpu-memory", "much", "--gpus", "1"], "write for ex"),
        (["plan", "--shape", "llama-3-8b", "--nodes", "0"], "--nodes must be 1 or more"),
        (["plan", "--shape", "llama-3-8b", "--gpus", "1", "--batch", "0"], "must be 1 or more"),
        (["plan", "--shape", "llama-3-8b", "--gpus", "1", "--precision", "fp8"], "bf16 or fp32"),
    ],
)
def test_what_is_wrong_is_said(words, message):
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_without_shards_the_next_command_is_named(run_yaml, tmp_path):
    (config,) = run_config.load(run_yaml, [f"data.shards={tmp_path / 'none'}"])
    with pytest.raises(InputError, match="run `rayfuse data extract`"):
        plan.plan_run(config, _described())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_model_of_texts_wants_shards_that_hold_some(make_shards, tmp_path):
    make_shards(tmp_path / "bare", rows=20, task="diagnoses", cxr_share=0.0)
    config = _text_run(tmp_path / "bare", tmp_path, "note_llm")
    with pytest.raises(InputError, match=r"note_llm reads texts, but .* have none"):
        plan.plan_run(config, _described())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_running_cluster_is_read(run_yaml):
    (config,) = run_config.load(run_yaml, ["scaling.num_workers=3"])
    machines = plan_machines.live(config, None)
    assert (machines.nodes, machines.workers, machines.gpu) == (1, 3, None)
    assert machines.node_memory is not None
    assert machines.node_memory > 2**28
    assert machines.cpu_flops > 1e8
    (wide,) = run_config.load(run_yaml, ["scaling.num_workers=500"])
    with pytest.raises(InputError, match="have room for"):
        plan_machines.live(wide, None)


@pytest.mark.slow
def test_a_measured_peak_is_as_predicted(tmp_path):
    """Real steps in a fresh process; more than 1 GiB above its imports."""
    out = tmp_path / "plan.json"
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "plan.py", "--only", "llama", "--out", out],
        check=True,
        timeout=900,
        capture_output=True,
    )
    case = json.loads(out.read_text())["cases"]["llama"]
    assert case["measured_mib"] > 1024
    assert abs(case["error"]) < 0.15


TEXTS = ("train.tokens_per_pass=256", "train.batch_size=32")


@pytest.fixture(scope="module")
def noted(make_shards, tmp_path_factory):
    """Admissions with notes of 1 to 60 words; one of all reads a long one."""
    folder = tmp_path_factory.mktemp("noted")

    def edit(rows):
        for place, row in enumerate(rows):
            row["notes"] = "pain " * (place % 30 + 1)
            row["lab_text"] = "Sodium 120 mEq/L low;" if place % 2 else None
            row["notes_available_at"] = row["prediction_time"]
        rows[0]["notes"] = "fever " * 500

    make_shards(folder, rows=60, task="diagnoses", cxr_share=0.0, edit=edit)
    return folder


def _text_run(noted, tmp_path, name, *overrides):
    document = {
        "name": "planned",
        "runs_dir": str(tmp_path / "runs"),
        "task": "diagnoses",
        "model": {"name": name},
        "data": {"shards": str(noted), "batches": {"labs": {"top": 8}}},
    }
    if name != "mltm":
        document["model"] |= {
            "backbone": str(TINY_LLAMA),
            "random_weights": True,
            "max_length": 64,
        }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(document))
    return run_config.load(path, list(overrides))[0]


def test_texts_are_cut_by_tokens_and_the_longest_is_among_them(noted, tmp_path):
    config = _text_run(noted, tmp_path, "note_llm", *TEXTS)
    found = plan.plan_run(config, _described(gpus=1))
    cuts = {option.cut.key: option.cut for option in found.options}
    assert list(cuts) == [f"train.tokens_per_pass={n}" for n in (256, 128, 64, 32)]
    counts = [cut.count for cut in cuts.values()]
    assert counts == sorted(counts)
    # 32 rows that hold one text of 64 tokens, in passes of 256: four of the longest together.
    assert next(iter(cuts.values())).rows >= 4
    assert "take: scaling.strategy=single" in plan_text.text(found)
    assert "train.tokens_per_pass=" in plan_text.text(found)
    assert "(longest 64)" in found.head[1]
    assert "image" not in found.head[1]


def test_a_packed_pass_has_no_padding(noted, tmp_path):
    def activations(layout):
        config = _text_run(noted, tmp_path, "note_llm", *TEXTS, f"model.layout={layout}")
        cohort = plan_cohort.read_cohort(config, task_spec("diagnoses"))
        model = plan.registry.get("note_llm")(config.model, task_spec("diagnoses"))
        texts = plan_cohort.texts_of(cohort, model, task_spec("diagnoses"))
        ways = plan_cohort.cuts(cohort, texts, config.train, 32, 32)
        passes = [[len(model.text.tokens(*pair).ids) for pair in rows.texts] for _, rows in ways]
        assert max(map(max, passes)) == 64
        assert all(sum(lengths) <= 256 for lengths in passes)
        return len(passes[0]) if layout == "packed" else len(passes[0]) * max(passes[0])

    assert activations("padded") <= 256
    assert activations("packed") >= 4


@pytest.mark.parametrize("name", ["medfuse_llm", "mltm"])
def test_models_of_labs_are_planned_with_their_columns(noted, tmp_path, name):
    few, many = (
        plan.plan_run(
            _text_run(noted, tmp_path, name, "model.items=64", f"data.batches.labs.top={top}"),
            _described(gpus=1),
        )
        for top in (8, 64)
    )
    assert "up to 8 lab columns" in few.head[1]
    inputs = [found.options[0].memory.resident["inputs"] for found in (few, many)]
    assert inputs[0] < inputs[1]


def test_a_frozen_base_is_in_no_checkpoint(noted, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(TINY_LLAMA, base)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY_LLAMA)).save_pretrained(base)
    changes = (f"model.backbone={base}", "model.random_weights=false")
    config = _text_run(noted, tmp_path, "note_llm", *changes)
    with plan.torch.device("meta"):
        model = plan.registry.get("note_llm")(config.model, task_spec("diagnoses"))
    trained = sum(each.numel() * 4 for each in model.parameters() if each.requires_grad)
    assert plan._saved(model) == trained
