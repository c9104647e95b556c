"""Fine-tuning a language model on notes: this loop against transformers' Trainer with peft.

Same base, same adapters, rows, precision and rows of a step, one process a contender and one after
another, without Ray. Lengths are lognormal with median 900 and 95th percentile 2,400 tokens, cut at
2,048. Real (non-padding) tokens a second over the timed steps, peak memory of the process (of the
device on CUDA), as JSON; ratios to the Trainer with dynamic padding and with length grouping.

On a CPU a tiny Llama; `--device cuda --shape llama-3-8b` draws weights of that shape.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from data.files import write_json
from data.schema import MODALITIES, N_FEATURES, Batch
from data.tasks import TaskSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path(__file__).parent / "results" / "llm.json"
SPEC = TaskSpec(name="llm", kind="multilabel", labels=tuple(f"label {i}" for i in range(10)))
ARMS = ("padded", "packed", "trainer", "trainer_grouped")
MEDIAN, P95, CUT = 900, 2400, 2048
WORDS = 1000
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": WORDS + 3,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-2-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
    },
}


def lengths(rows: int, seed: int = 0) -> np.ndarray:
    """[rows] tokens of each text."""
    sigma = math.log(P95 / MEDIAN) / 1.6449
    drawn = np.random.default_rng(seed).lognormal(math.log(MEDIAN), sigma, rows)
    return np.clip(drawn.round(), 8, CUT).astype(int)


def texts(rows: int, seed: int = 0) -> list[str]:
    """Made-up words, one token each; BOS is the token that is left."""
    rng = np.random.default_rng([seed, 1])
    return [
        " ".join(f"w{word}" for word in rng.integers(WORDS, size=length - 1))
        for length in lengths(rows, seed)
    ]


def make_base(folder: Path, shape: str) -> None:
    """A Llama's configuration and a tokenizer of words; on a small shape its weights too."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = AutoConfig.for_model("llama", max_position_embeddings=CUT, **SHAPES[shape])
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 1
    names = ["<bos>", "<eos>", "<unk>", *(f"w{word}" for word in range(WORDS))]
    vocabulary = {name: place for place, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    if shape == "tiny":
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    config.save_pretrained(folder)


class Stream:
    """Rows in order, a batch a step."""

    def __init__(self, notes: list[str], size: int) -> None:
        self._notes, self._size = notes, size
        self._targets = torch.from_numpy(_targets(len(notes)))

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches."""
        return len(self._notes) // self._size

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The same batches in every epoch."""
        for step in range(start_step, self.steps_per_epoch):
            rows = np.arange(step * self._size, (step + 1) * self._size)
            present = {name: torch.zeros(len(rows), dtype=torch.bool) for name in MODALITIES}
            yield Batch(
                ehr=torch.zeros(len(rows), 1, N_FEATURES),
                lengths=torch.ones(len(rows), dtype=torch.int64),
                cxr=torch.zeros(0, 3, 1, 1),
                cxr_index=torch.zeros(0, dtype=torch.int64),
                present={**present, "notes": torch.ones(len(rows), dtype=torch.bool)},
                targets=self._targets[rows],
                cxr_targets=torch.zeros(0, 14),
                rows=rows,
                notes=tuple(self._notes[row] for row in rows),
                notes_index=torch.arange(len(rows)),
            )


def ours(given: argparse.Namespace, base: Path, notes: list[str], layout: str) -> list[float]:
    """Times at which the first step began and the last one ended."""
    from fusion import registry
    from fusion.tasks import Task
    from fusion.training import loop
    from fusion.training.config import CheckpointConfig, TrainConfig
    from fusion.training.optim import OptimConfig
    from fusion.training.strategy import build_strategy

    kind = registry.get("note_llm")
    config = kind.Config.model_validate(
        {
            "name": "note_llm",
            "backbone": str(base),
            "random_weights": given.shape != "tiny",
            "max_length": CUT,
            "loss": "bce",
            "layout": layout,
            **_adapters(given),
        }
    )
    train = TrainConfig(
        epochs=1, batch_size=given.batch, tokens_per_pass=given.tokens, recompute=given.recompute
    )
    chosen = loop.Settings(train, OptimConfig(name="adamw", lr=1e-4), CheckpointConfig(), seed=0)
    strategy = build_strategy("single", given.device, "none")
    loop.prepare(strategy, lambda: kind(config, SPEC), chosen)
    times: list[float] = []

    def heard(stage: str, progress: Any) -> None:
        if (stage == "data" and not times) or stage == "validation":
            times.append(_now(given))

    with tempfile.TemporaryDirectory() as folder:
        made = loop.Session(
            strategy,
            Task(SPEC),
            chosen,
            Stream(notes, given.batch),
            Stream(notes[:2], 1),
            Path(folder),
            log=_Silent(),
            document={"config": {}},
            beat=heard,
        )
        loop.fit(made)
    return times


def trainer(given: argparse.Namespace, base: Path, notes: list[str], grouped: bool) -> list[float]:
    """Likewise, of transformers' Trainer with peft's own model."""
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoConfig,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = "<eos>"
    adapters = _adapters(given)
    low = adapters["base_precision"] == "bf16"
    settings: dict[str, Any] = {
        "num_labels": len(SPEC.labels),
        "problem_type": "multi_label_classification",
    }
    if given.shape == "tiny":
        model = AutoModelForSequenceClassification.from_pretrained(base, **settings)
    else:
        config = AutoConfig.from_pretrained(base, **settings)
        with torch.device(given.device):
            model = AutoModelForSequenceClassification.from_config(
                config, dtype=torch.bfloat16 if low else torch.float32
            )
    model.config.pad_token_id = tokenizer.pad_token_id
    lora = LoraConfig(
        r=adapters["rank"],
        lora_alpha=32.0,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="SEQ_CLS",
        modules_to_save=["score"],
    )
    model = get_peft_model(model, lora)
    targets = _targets(len(notes)).tolist()
    rows = [
        {"input_ids": tokenizer(note)["input_ids"], "labels": target}
        for note, target in zip(notes, targets, strict=True)
    ]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            times.append(_now(given))

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(_now(given))

    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=given.micro,
                gradient_accumulation_steps=given.batch // given.micro,
                num_train_epochs=1,
                learning_rate=1e-4,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                train_sampling_strategy="group_by_length" if grouped else "random",
                gradient_checkpointing=given.recompute,
                bf16=low and given.device == "cuda",
                use_cpu=given.device == "cpu",
                report_to=[],
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
                seed=0,
            ),
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[Clock()],
        ).train()
    return times


def run_arm(given: argparse.Namespace) -> dict[str, float]:
    """One contender in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    base, notes = Path(given.base), texts(given.batch * given.steps)
    if given.arm in ("padded", "packed"):
        times = ours(given, base, notes, given.arm)
    else:
        times = trainer(given, base, notes, given.arm == "trainer_grouped")
    # Every contender reads every text once, in an order of its own.
    seconds = times[1] - times[0]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if given.device == "cuda":
        memory = torch.cuda.max_memory_allocated()
    return {
        "tokens_per_s": round(float(lengths(len(notes)).sum()) / seconds, 1),
        "seconds": round(seconds, 2),
        "peak_mib": round(memory / 2**20),
    }


def main() -> None:
    """Run every contender in a process of its own, in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps, of one epoch")
    parser.add_argument("--batch", type=int, default=32, help="rows of a step")
    parser.add_argument("--micro", type=int, default=8, help="rows of the Trainer's micro-batch")
    told = "tokens of our passes (default: 4096 on a CPU, 16384 on a GPU)"
    parser.add_argument("--tokens", type=int, help=told)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.tokens = given.tokens or (4096 if given.device == "cpu" else 16384)
    if given.arm:
        print(json.dumps(run_arm(given)))
        return
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in given.arms}
    with tempfile.TemporaryDirectory(prefix="rf-llm-") as base:
        make_base(Path(base), given.shape)
        for _ in range(given.rounds):
            for arm in given.arms:
                command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm, "--base", base]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{arm}: {done.stderr[-2000:]}")
                found[arm].append(json.loads(done.stdout.splitlines()[-1]))
                print(arm, found[arm][-1], file=sys.stderr)
    write_json(given.out, summary(given, found))


def summary(given: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """The best round of each contender, and ours as ratios to the Trainer's."""
    best = {arm: max(rounds, key=lambda one: one["tokens_per_s"]) for arm, rounds in found.items()}
    speed = {arm: one["tokens_per_s"] for arm, one in best.items()}
    theirs = [speed[arm] for arm in ("trainer", "trainer_grouped") if arm in speed]
    drawn = lengths(given.batch * given.steps)
    return {
        "machine": torch.cuda.get_device_name() if given.device == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "settings": {
            name: getattr(given, name)
            for name in ("shape", "device", "steps", "batch", "micro", "tokens", "recompute")
        },
        "lengths": {"median": float(np.median(drawn)), "mean": float(drawn.mean())},
        "rounds": found,
        "best": best,
        "ratio_to_dynamic_padding": {
            arm: round(speed[arm] / speed["trainer"], 3) for arm in ARMS[:2] if arm in speed
        }
        if "trainer" in speed
        else {},
        "ratio_to_the_better": {
            arm: round(speed[arm] / max(theirs), 3) for arm in ARMS[:2] if arm in speed
        }
        if theirs
        else {},
    }


class _Silent:
    """A log that keeps nothing."""

    def write(self, kind: str, progress: Any, values: Any) -> None:
        """Nothing."""

    def rotate(self) -> None:
        """Nothing."""


def _adapters(given: argparse.Namespace) -> dict[str, Any]:
    return {
        "adapter": "lora",
        "rank": 16,
        "adapter_dropout": 0.0,
        "base_precision": "bf16" if given.device == "cuda" else "fp32",
    }


def _targets(rows: int) -> np.ndarray:
    return (np.random.default_rng(2).random((rows, len(SPEC.labels))) < 0.3).astype(np.float32)


def _now(given: argparse.Namespace) -> float:
    if given.device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


if __name__ == "__main__":
    main()
