"""Finished runs with untrained weights on synthetic shards; all behind training is real."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from data.tasks import task_spec
from fusion import registry
from fusion.training.checkpoint import write_weights
from ray_jobs import config as run_config
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IMAGE = {"resize": 24, "size": 24, "augment": False}


def _history(folder: Path, epochs: int) -> None:
    """Metrics lines as the training loop writes them."""
    lines = [{"kind": "event", "epoch": 0, "step": 0, "time": 1000.0, "values": {"event": "start"}}]
    lines[0]["values"]["updates"] = 0
    for epoch in range(epochs):
        step, start = 5 * (epoch + 1), 1000.0 + 10 * epoch
        train = {"task": 0.7 - 0.05 * epoch, "lr": 1e-3, "steps": 5, "of": 5 * epochs}
        val = {"auroc": 0.6 + 0.05 * epoch, "loss": 0.69 - 0.01 * epoch, "rows": 20, "best": True}
        for kind, seconds, values in (("train", 8, train), ("val", 9, val)):
            line = {"kind": kind, "epoch": epoch, "step": step, "time": start + seconds}
            lines.append({**line, "values": values})
    folder.mkdir(parents=True)
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "part-00001.jsonl").write_text(text + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def make_run(
    make_shards: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`make_run(model, seed, name, shards, rows, edit, **config)`: a finished run's folder.

    `options` is merged into the model's block, `batches` into data.batches.
    """
    root = tmp_path_factory.mktemp("runs")
    default = root / "shards"
    numbered = iter(range(1000))

    def make(
        model: str,
        *,
        seed: int = 0,
        name: str | None = None,
        shards: Path | None = None,
        rows: int = 240,
        edit: Callable[[list[dict]], None] | None = None,
        **config: object,
    ) -> Path:
        task = str(config.get("task", "phenotyping_48h"))
        if shards is None:
            shards = default if edit is None else root / f"shards-{next(numbered)}"
        if not (shards / "manifest.json").is_file():
            make_shards(shards, rows=rows, task=task, image_size=32, hours=24, edit=edit)
        chosen = registry.get(model)
        run = run_config.from_dump(
            {
                "name": name or f"{model}-{next(numbered)}",
                "runs_dir": root,
                "task": task,
                "model": chosen.tiny().model_dump(mode="json") | dict(config.pop("options", {})),
                "data": {
                    "shards": shards,
                    "batches": {
                        "image": IMAGE,
                        "cache_dir": root / "cache",
                        **dict(config.pop("batches", {})),
                    },
                },
                "evaluate": {"resamples": 40},
                "seed": seed,
                **config,
            }
        )
        torch.manual_seed(seed)
        built = chosen(run.model, task_spec(task))
        write_weights(run.folder / "best", built, {"selected": "best"})
        run_config.dump(run, RunFolder(run.folder).config)
        _history(RunFolder(run.folder).metrics / "attempt-1", epochs=3)
        return run.folder

    return make
