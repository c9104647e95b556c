"""Each line of a preset changes an output: the cases are read from the preset files themselves."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from data.loader import open_stream
from data.schema import N_FEATURES, Batch
from data.tasks import task_spec
from fusion import registry
from fusion.hashed import digest
from fusion.training import loop
from fusion.training.checkpoint import read_weights
from fusion.training.strategy import Single
from ray_jobs import config as run_config
from ray_jobs import evaluate, session
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_jobs.config import RunConfig

TASK = "phenotyping_48h"
IMAGE = {"resize": 40, "size": 32}
ELSEWHERE = ("rank_margin", "reading", "shared_wb")
"""In docs/presets.md but in no preset; flipped in the tests of DrFuse, MLTM and its encoder."""


def _document(model: str, dotted: str | None = None, value: Any = None) -> dict[str, Any]:
    """A run of the schema's defaults, but for one value."""
    kind = registry.get(model)
    document: dict[str, Any] = {
        "name": "flip",
        "task": _task(model),
        "model": kind.tiny().model_dump(),
        "data": {
            "shards": "shards",
            "batches": {"image": dict(IMAGE), "withhold_cxr": 0.0, "labs": {"top": 3}},
        },
        "init_from": dict.fromkeys(kind.pretrained, "weights"),
        "optim": {"lr": 3e-2},
        "train": {"epochs": 2, "batch_size": 5},
        "evaluate": {"resamples": 20},
    }
    if dotted is not None:
        *parents, leaf = dotted.split(".")
        block = document
        for parent in parents:
            block = block.setdefault(parent, {})
        block[leaf] = value
    return document


def _task(model: str) -> str:
    return "diagnoses" if "notes" in registry.get(model).modalities else TASK


def _admissions() -> Batch:
    """Four rows with a note and results."""
    generator = torch.Generator().manual_seed(0)
    present = torch.ones(4, dtype=torch.bool)
    return Batch(
        ehr=torch.zeros(4, 1, N_FEATURES),
        lengths=torch.ones(4, dtype=torch.int64),
        cxr=torch.zeros(0, 3, 1, 1),
        cxr_index=torch.zeros(0, dtype=torch.int64),
        present={"ehr": ~present, "cxr": ~present, "notes": present, "labs": present},
        targets=torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None].expand(4, 10),
        cxr_targets=torch.zeros(0, 14),
        rows=np.arange(4),
        notes=("fever", "no cough", "chest pain", "edema"),
        notes_index=torch.arange(4),
        lab_texts=("",) * 4,
        labs=torch.rand(4, 3, generator=generator),
        labs_observed=torch.ones(4, 3, dtype=torch.bool),
    )


def _lines() -> list[tuple[str, str, Any]]:
    """(dotted path, model, value) of every line of every preset that leaves the default."""
    found = set()
    for preset in ("corrected", "code", "paper"):
        for dotted, value in run_config.preset_values(preset).items():
            plain = run_config.plain_path(dotted)
            if plain.startswith("data.extract."):
                continue
            models = dotted.split("[")[1].split("]")[0].split("|") if "[" in dotted else ["lstm"]
            frozen = tuple(value) if isinstance(value, list) else value
            default = _value(run_config.from_document(_document(models[0]), place="x"), plain)
            if frozen != default:
                # Only a model's own switches are read by its code; the rest is the same for all.
                read_by = models if plain.startswith("model.") else ["lstm"]
                found |= {(plain, model, frozen) for model in read_by}
    return sorted(found, key=str)


def _value(config: RunConfig, dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


class Bench:
    """Shards and runs on which a config's outputs are observed."""

    def __init__(self, shards: Path, root: Path, make_run: Callable[..., Path]) -> None:
        self._shards, self._root, self._make_run = shards, root, make_run
        self._count = 0
        self._defaults: dict[tuple[str, str], bytes] = {}

    def default(self, dotted: str, model: str) -> bytes:
        """The output under the defaults, the same twice; one for all switches of a block."""
        key = (dotted.split(".")[0].replace("optim", "train"), model)
        if key not in self._defaults:
            first, second = (self.observe(dotted, _document(model)) for _ in range(2))
            assert first == second
            self._defaults[key] = first
        return self._defaults[key]

    def observe(self, dotted: str, document: dict[str, Any]) -> bytes:
        """What a run of `document` gives where the switch `dotted` is read."""
        config = run_config.from_document(document, place="flip")
        batches = config.data.batches.model_copy(update={"cache_dir": self._root / "cache"})
        data = config.data.model_copy(update={"shards": self._shards, "batches": batches})
        config = config.model_copy(update={"data": data})
        if dotted.startswith("data.batches."):
            return self._batches(config)
        if dotted.startswith("model."):
            return self._forward(config)
        if dotted.startswith(("optim.", "train.")):
            return self._training(config)
        if dotted.startswith("evaluate."):
            return self._evaluation(config)
        raise AssertionError(f"{dotted}: no output is known that it changes; add one here")

    def _stream(self, config: RunConfig, split: str) -> list[Batch]:
        stream = open_stream(
            config.data.shards,
            split,
            config.data.batches,
            batch_size=5,
            seed=0,
            train=split == "train",
        )
        return [batch for batch in islice(stream.epoch(0), 9) if batch is not None]

    def _batches(self, config: RunConfig) -> bytes:
        parts = [
            tensor.numpy().tobytes()
            for split in ("train", "val", "test")
            for batch in self._stream(config, split)
            for tensor in (torch.from_numpy(batch.rows), batch.ehr, batch.cxr, batch.cxr_index)
        ]
        return b"".join(parts)

    def _forward(self, config: RunConfig) -> bytes:
        torch.manual_seed(0)
        kind = registry.get(config.model.name)
        model = kind(config.model, task_spec(config.task)).train()
        batch = (
            next(
                batch
                for batch in self._stream(config, "train")
                if 2 <= int(batch.present["cxr"].sum()) < len(batch)
            )
            if config.task == TASK
            else _admissions()
        )
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                # As drawn, an untrained network gives zeros for a zero image.
                torch.nn.init.normal_(module.bias)
        torch.manual_seed(1)
        output = model(batch)
        terms = [(term.sum * term.scale).item() for _, term in sorted(output.terms.items())]
        counted = str([(name, term.over) for name, term in sorted(output.terms.items())])
        return (
            output.logits.detach().numpy().tobytes() + np.array(terms).tobytes() + counted.encode()
        )

    def _training(self, config: RunConfig) -> bytes:
        self._count += 1
        folder = RunFolder(self._root / f"run-{self._count}")
        opened = session.open_session(config, folder, Single(), ".stop")
        loop.fit(opened)
        return digest(read_weights(folder.best)[0]).encode()

    def _evaluation(self, config: RunConfig) -> bytes:
        block = config.evaluate.model_dump(mode="json")
        folder = self._make_run("lstm", shards=self._shards, evaluate=block)
        found = evaluate.run(folder, split="train")
        return str(found["sets"]).encode()


@pytest.fixture(scope="module")
def bench(
    make_shards: Callable, make_run: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Bench:
    def outlier(rows: list[dict]) -> None:
        rows[0]["ehr"][7] = 1e5

    root = tmp_path_factory.mktemp("flips")
    make_shards(root / "shards", rows=60, task=TASK, image_size=48, hours=24, edit=outlier)
    return Bench(root / "shards", root, make_run)


@pytest.mark.parametrize(
    ("dotted", "model", "value"),
    [pytest.param(*line, id=f"{line[0]}={line[2]}-{line[1]}") for line in _lines()],
)
def test_a_line_of_a_preset_changes_an_output(
    bench: Bench, dotted: str, model: str, value: Any
) -> None:
    assert bench.default(dotted, model) != bench.observe(dotted, _document(model, dotted, value))


def test_every_documented_switch_is_a_line_of_a_preset() -> None:
    """docs/presets.md names nothing that is not flipped above."""
    text = (Path(__file__).parents[2] / "docs" / "presets.md").read_text(encoding="utf-8")
    documented = {
        name.rsplit(".", 1)[-1]
        for row in re.findall(r"^\| (`.*?) \|", text.split("## Batches")[1], re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", row)
    }
    flipped = {dotted.rsplit(".", 1)[-1] for dotted, _, _ in _lines()}
    assert documented - flipped == set(ELSEWHERE)
    assert flipped <= documented
