"""Predicted against measured peak memory, on CPUs: real training steps in processes of their own.

    python benchmarks/plan.py [--only NAME ...] [--out benchmarks/results/plan.json]
    python benchmarks/plan.py --repredict    # new predictions beside what was measured before
    python benchmarks/plan.py --page         # the tables of docs/plan.md

Each worker is a fresh process. It imports what a worker imports, notes its resident memory, builds
a model, trains two steps with the loop's own `train_step`, and reports the highest resident memory
of the second (the kernel's VmHWM). glibc is told to hand freed tensors back to the system
(MALLOC_MMAP_THRESHOLD_), so that what is resident is what is alive; `--default-malloc` measures
without that. The prediction is `rayfuse plan`'s: from shapes alone, made in another process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.schema import Batch
    from data.tasks import TaskSpec
    from fusion.planning.dry import Rows
    from fusion.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "hidden": 768,
    "layers": 12,
    "heads": 12,
    "kv_heads": 4,
    "feedforward": 2048,
    "vocabulary": 12000,
}
WIDE = {**SMALL, "hidden": 1024, "heads": 16, "layers": 10, "feedforward": 2816}
CASES: dict[str, dict[str, Any]] = {
    "medfuse": {"model": "medfuse", "rows": [24, 48, 24, 224]},
    "medfuse-bf16": {"model": "medfuse", "rows": [48, 48, 48, 224], "train": {"precision": "bf16"}},
    "medfuse-ddp": {"model": "medfuse", "rows": [24, 48, 24, 224], "strategy": "ddp"},
    "drfuse": {"model": "drfuse", "rows": [4, 48, 4, 224]},
    "drfuse-last": {"model": "drfuse", "rows": [4, 48, 3, 224], "train": {"channels_last": True}},
    "drfuse-ddp": {"model": "drfuse", "rows": [4, 48, 4, 160], "strategy": "ddp"},
    "drfuse-zero1": {"model": "drfuse", "rows": [4, 48, 4, 192], "strategy": "zero1"},
    "drfuse-zero2": {"model": "drfuse", "rows": [4, 48, 4, 192], "strategy": "zero2"},
    "drfuse-zero3": {"model": "drfuse", "rows": [4, 48, 4, 160], "strategy": "zero3"},
    "llama": {"model": "llama", "config": SMALL, "rows": [4, 128, 0, 32]},
    "llama-accumulation": {
        "model": "llama",
        "config": SMALL,
        "rows": [4, 128, 0, 32],
        "train": {"accumulation": 2},
    },
    "llama-ddp": {"model": "llama", "config": SMALL, "rows": [2, 128, 0, 32], "strategy": "ddp"},
    "llama-zero1": {"model": "llama", "config": WIDE, "rows": [2, 96, 0, 32], "strategy": "zero1"},
    "llama-zero2": {"model": "llama", "config": WIDE, "rows": [2, 96, 0, 32], "strategy": "zero2"},
    "llama-zero3": {"model": "llama", "config": WIDE, "rows": [2, 96, 0, 32], "strategy": "zero3"},
    "llama-zero2-offload": {
        "model": "llama",
        "config": WIDE,
        "rows": [2, 96, 0, 32],
        "strategy": "zero2",
        "offload": "optimizer",
    },
    "llama-lora": {
        "model": "llama",
        "config": {**WIDE, "lora_rank": 8},
        "rows": [4, 192, 0, 32],
    },
    "llama-lora-bf16": {
        "model": "llama",
        "config": {**WIDE, "lora_rank": 16, "base": "bf16"},
        "rows": [8, 192, 0, 32],
        "train": {"precision": "bf16"},
    },
}
BASE = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 2816,
    "vocab_size": 12000,
    "max_position_embeddings": 2048,
}
"""Of the language models of the text cases; weights are drawn, the tokenizer is the shipped one."""
LORA = {"adapter": "lora", "rank": 16}
TEXT_CASES: dict[str, dict[str, Any]] = {
    "note": {"config": {**LORA, "base_precision": "fp32"}, "rows": [4, 384, 0, 32]},
    "note-bf16": {"config": LORA, "rows": [8, 512, 0, 32]},
    "note-packed": {"config": {**LORA, "layout": "packed"}, "rows": [6, 512, 0, 32]},
    "note-dora": {"config": {**LORA, "adapter": "dora"}, "rows": [6, 384, 0, 32]},
    "note-recompute": {
        "config": LORA,
        "rows": [24, 512, 0, 32],
        "train": {"recompute": True},
    },
    "note-full": {"config": {"adapter": "full"}, "rows": [2, 256, 0, 32]},
    "note-full-bf16-zero3": {
        "config": {"adapter": "full"},
        "rows": [2, 384, 0, 32],
        "train": {"precision": "bf16"},
        "strategy": "zero3",
    },
    "note-ddp": {"config": LORA, "rows": [4, 512, 0, 32], "strategy": "ddp"},
    "note-zero2": {"config": LORA, "rows": [4, 512, 0, 32], "strategy": "zero2"},
    "note-zero3": {"config": LORA, "rows": [4, 512, 0, 32], "strategy": "zero3"},
    "medfuse-llm": {
        "model": "medfuse_llm",
        "config": {**LORA, "items": 100},
        "rows": [8, 512, 0, 32],
        "lab_columns": 100,
    },
    "medfuse-llm-zero3": {
        "model": "medfuse_llm",
        "config": {**LORA, "items": 100},
        "rows": [4, 448, 0, 32],
        "lab_columns": 100,
        "strategy": "zero3",
    },
}
CASES |= {name: {"model": "note_llm", **case} for name, case in TEXT_CASES.items()}
CALIBRATED_ON = [
    "medfuse: 16 rows of 224 px (fp32, bf16, channels-last); ddp, 8 rows a worker of 112 px",
    "drfuse: 16 rows of 224 px; ddp, 4 rows a worker of 112 px",
    "a Llama of 56 M parameters: single, LoRA, ddp, zero1, zero2, zero3",
]
"""What the form of the arithmetic was found on; none of these is among the cases."""
EXACT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


def factory(case: dict[str, Any], folder: Path):
    """How to build a case's model, and its task."""
    from data.tasks import task_spec
    from fusion import registry
    from fusion.planning.shapes import Llama, LlamaConfig

    if case["model"] == "llama":
        spec = task_spec("phenotyping")
        config = LlamaConfig.model_validate(case["config"])
        return lambda: Llama(config, spec), spec
    kind = registry.get(case["model"])
    given: dict[str, Any] = {"name": case["model"], **case.get("config", {})}
    if "notes" in kind.modalities:
        given |= {"backbone": str(base(folder)), "random_weights": True}
        given["max_length"] = case["rows"][1]
    spec = task_spec("diagnoses" if "notes" in kind.modalities else "phenotyping")
    return lambda: kind(kind.Config.model_validate(given), spec), spec


def base(folder: Path) -> Path:
    """A language model's configuration and tokenizer."""
    from fusion.encoders.text_base import TINY_LLAMA

    made = folder / "base"
    if not made.is_dir():
        shutil.copytree(TINY_LLAMA, made)
        path = made / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **BASE}))
    return made


def rows_of(case: dict[str, Any], rows: int, images: int) -> Rows:
    """So many rows of the case's shape."""
    from fusion.planning.dry import Rows

    _, length, _, size = case["rows"]
    if case["model"] not in ("note_llm", "medfuse_llm"):
        return Rows((length,) * rows, images, size)
    # Longer than max_length in any tokenizer, so cut to it.
    texts = (("pain " * length, ""),) * rows
    return Rows((1,) * rows, texts=texts, lab_columns=case.get("lab_columns", 0))


def predict(case: dict[str, Any]) -> dict[str, Any]:
    """What `rayfuse plan` reckons of one worker, above the import baseline."""
    from fusion.planning.dry import dry_step
    from fusion.planning.memory import RUNTIME, Layout, footprint
    from fusion.tasks import Task
    from fusion.training.optim import OptimConfig

    train = _train(case)
    rows, _, images, _ = case["rows"]
    parts = train.accumulation
    micro = rows_of(case, -(-rows // parts), -(-images // parts))
    strategy = case.get("strategy", "single")
    world = 1 if strategy == "single" else 2
    layout = Layout(strategy, case.get("offload", "none"), world, parts)
    with tempfile.TemporaryDirectory() as folder:
        make, spec = factory(case, Path(folder))
        step = dry_step(
            make, Task(spec), train, OptimConfig(), micro, inputs_kept=layout.inputs_kept
        )
    memory = footprint(step, layout)
    return {
        "bytes": memory.device_peak + memory.host_peak + RUNTIME,
        "parts": {**memory.worst, **{f"host {k}": v for k, v in memory.host.items()}},
    }


def worker(case: dict[str, Any], rank: int, world: int, store: str) -> None:
    """Train two steps and print this process's memory."""
    import torch
    import torch._dynamo

    from fusion.tasks import Task
    from fusion.training import loop
    from fusion.training.config import CheckpointConfig
    from fusion.training.objective import census
    from fusion.training.optim import OptimConfig
    from fusion.training.optimizers import train_mode
    from fusion.training.restore import start
    from fusion.training.strategy import build_strategy

    torch.set_num_threads(1)
    make, spec = factory(case, Path(store).parent)
    if spec.name == "diagnoses" or case["model"] == "llama":
        import peft  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401
    strategy_name = case.get("strategy", "single")
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world
        )
    _warm(torch)
    strategy = build_strategy(strategy_name, "cpu", case.get("offload", "none"))
    baseline = _status("VmRSS")
    settings = loop.Settings(_train(case), OptimConfig(), CheckpointConfig())
    loop.prepare(strategy, make, settings)
    batch = _batch(case, spec)

    class Stream:
        steps_per_epoch = 1

        def epoch(self, epoch: int, start_step: int = 0):
            yield batch

    with tempfile.TemporaryDirectory() as folder:
        session = loop.Session(strategy, Task(spec), settings, Stream(), Stream(), Path(folder))
        start(session)
        train_mode(strategy.model)
        peaks, seconds = [], 0.0
        for _ in range(2):
            Path("/proc/self/clear_refs").write_text("5")
            began = time.perf_counter()
            loop.train_step(session, batch, strategy.sum(census(batch, strategy.model)))
            seconds = time.perf_counter() - began
            peaks.append(_status("VmHWM") - baseline)
    print(json.dumps({"base": baseline, "peak": peaks[-1], "first": peaks[0], "seconds": seconds}))


def _train(case: dict[str, Any]) -> TrainConfig:
    from fusion.training.config import TrainConfig

    return TrainConfig.model_validate({"tokens_per_pass": None, **case.get("train", {})})


def _batch(case: dict[str, Any], spec: TaskSpec) -> Batch:
    """All rows of a case, with values."""
    from dataclasses import replace

    import numpy as np
    import torch

    rows, _, images, _ = case["rows"]
    shapes = rows_of(case, rows, images).batch(spec)
    present = {name: torch.zeros(rows, dtype=torch.bool) for name in shapes.present}
    present["ehr"][:] = True
    present["cxr"][:images] = True
    present["labs"][:] = True
    return replace(
        shapes,
        ehr=torch.randn(shapes.ehr.shape),
        lengths=torch.full((rows,), shapes.ehr.shape[1]),
        cxr=torch.randn(shapes.cxr.shape),
        cxr_index=torch.arange(images),
        present=present,
        targets=torch.ones(rows, len(spec.labels)),
        cxr_targets=torch.zeros(images, 14),
        labs=torch.rand(shapes.labs.shape),
        labs_observed=torch.ones(shapes.labs.shape, dtype=torch.bool),
        rows=np.arange(rows),
    )


def _warm(torch: Any) -> None:
    """Load what the first operations of any kind load, before the baseline is taken."""
    image = torch.nn.Conv2d(3, 4, 3)
    image(torch.randn(2, 3, 16, 16)).sum().backward()
    torch.optim.Adam(image.parameters()).step()


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def measure(case: dict[str, Any], *, exact: bool) -> dict[str, Any]:
    """Run a case's workers; the highest of their peaks."""
    world = 1 if case.get("strategy", "single") == "single" else 2
    environment = {
        **os.environ,
        **(EXACT if exact else {}),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    with tempfile.TemporaryDirectory() as folder:
        base(Path(folder))
        running = [
            subprocess.Popen(
                [
                    sys.executable,
                    __file__,
                    "--worker",
                    json.dumps(case),
                    str(rank),
                    str(world),
                    f"{folder}/store",
                ],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        told = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"{case}: a worker failed")
    return max((json.loads(text.splitlines()[-1]) for text in told), key=lambda each: each["peak"])


def measured_table(path: Path) -> str:
    """Predicted and measured, a row a case."""
    cases = json.loads(path.read_text())["cases"]
    lines = [
        "| case | workers | rows, steps, images, px | predicted MiB | measured MiB | error |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in cases.items():
        case = found["case"]
        workers = 1 if case.get("strategy", "single") == "single" else 2
        lines.append(
            f"| {name} | {workers} | {', '.join(map(str, case['rows']))} | "
            f"{found['predicted_mib']:,} | {found['measured_mib']:,} | {found['error']:+.1%} |"
        )
    return "\n".join(lines)


def paper_table() -> str:
    """8B and 13B, whole and with adapters, on 1 to 64 GPUs: what to take."""
    from dataclasses import replace

    from fusion.hardware import GIBI, GPUS
    from fusion.planning.machines import Machines
    from fusion.planning.options import gib
    from fusion.planning.shapes import SHAPES
    from ray_jobs import plan

    lines = [
        "| model | tuning | GPUs | strategy | offload | micro-batch x times | GPU memory | "
        "node memory | step s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    gpu = replace(GPUS["H100"], memory=80 * GIBI)
    for name in SHAPES:
        for count in (1, 2, 4, 8, 16, 32, 64):
            machines = Machines(-(-count // 8), min(count, 8), 1024 * GIBI, gpu, 50e9)
            found = plan.plan_shape(
                name,
                machines,
                sequence=2048,
                batch=64,
                lora_rank=16,
                train=plan.shape_training("bf16", recompute=True),
            )
            taken = {option.note: option for option in found.best}
            for note in ("full", "lora 16"):
                if (option := taken.get(note)) is None:
                    lines.append(f"| {name} | {note} | {count} | nothing fits | | | | | |")
                    continue
                layout = option.layout
                lines.append(
                    f"| {name} | {note} | {count} | {layout.strategy} | {layout.offload} | "
                    f"{option.cut.rows} x {layout.accumulation} | {gib(option.device)} | "
                    f"{gib(option.host)} | {option.seconds:.3g} |"
                )
    return "\n".join(lines)


def write_page(results: Path) -> None:
    """Put both tables between their marks in docs/plan.md."""
    page = ROOT / "docs/plan.md"
    text = page.read_text(encoding="utf-8")
    for mark, table in (("measured", measured_table(results)), ("paper", paper_table())):
        head, rest = text.split(f"<!-- {mark} -->\n", 1)
        _, tail = rest.split(f"<!-- /{mark} -->", 1)
        text = f"{head}<!-- {mark} -->\n{table}\n<!-- /{mark} -->{tail}"
    page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--default-malloc", action="store_true")
    parser.add_argument("--repredict", action="store_true")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/plan.json")
    parser.add_argument("--worker", nargs=4)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.worker:
        case, rank, world, store = arguments.worker
        worker(json.loads(case), int(rank), int(world), store)
        return
    if arguments.page:
        write_page(arguments.out)
        return
    results = {}
    if arguments.out.is_file():
        results = json.loads(arguments.out.read_text())["cases"]
    for name in arguments.only:
        case = CASES[name]
        predicted = predict(case)
        if arguments.repredict:
            old = results[name]
            measured = {
                "peak": old["measured_mib"] * 2**20,
                "base": old["import_baseline_mib"] * 2**20,
            }
        else:
            measured = measure(case, exact=not arguments.default_malloc)
        error = predicted["bytes"] / measured["peak"] - 1
        results[name] = {
            "case": case,
            "predicted_mib": round(predicted["bytes"] / 2**20),
            "measured_mib": round(measured["peak"] / 2**20),
            "import_baseline_mib": round(measured["base"] / 2**20),
            "error": round(error, 4),
            "parts_mib": {part: round(size / 2**20) for part, size in predicted["parts"].items()},
        }
        print(json.dumps({name: results[name]}))
        document = {
            "calibrated_on": CALIBRATED_ON,
            "malloc": "default" if arguments.default_malloc else EXACT,
            "cases": {each: results[each] for each in CASES if each in results},
        }
        arguments.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
