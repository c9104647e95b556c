"""A language model on notes, raw tables to report; no word of a note leaves the shards."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from data.sources import synthetic
from fusion.models.note_llm import TINY_LLAMA

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.slow, pytest.mark.ray]
CANARY = "zebraquartz"
OWN_LABELS = {
    "Any heart disease": {"icd9": ["393-398", "410-429"], "icd10": ["I20-I52"]},
    "High pressure": {"icd9": ["401-405"], "icd10": ["I10-I16"]},
    "Kidney disease": {"icd9": ["580-589"], "icd10": ["N17-N19"]},
}
"""A hospital's own label file, through all of it."""


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic hospital with the canary in every note, in a section that is kept."""
    folder = tmp_path_factory.mktemp("canary") / "hospital"
    synthetic.generate(
        folder,
        patients=120,
        seed=3,
        release="mimic-iv-2.2",
        image_size=64,
        chart_events_per_stay=60,
    )
    (path,) = folder.glob("mimic-iv-note/*/**/discharge.csv*")
    table = pl.read_csv(path)
    planted = table.with_columns(
        pl.col("text").str.replace("(Chief Complaint:\n)", f"${{1}}{CANARY} ")
    )
    assert planted["text"].str.contains(CANARY).all()
    with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as file:
        file.write(planted.write_csv().encode())
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with weights, as a downloaded one lies on a disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(TINY_LLAMA, folder)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(TINY_LLAMA))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def said(
    start_head: Callable, hospital: Path, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The folder of all that the commands wrote, and all that they and Ray's processes said."""
    root = tmp_path_factory.mktemp("work")
    own = root / "labels.yaml"
    own.write_text(yaml.safe_dump({"labels": OWN_LABELS}, sort_keys=False), encoding="utf-8")
    run = {
        "name": "notes",
        "runs_dir": str(root / "runs"),
        "task": "diagnoses",
        "model": {"name": "note_llm", "backbone": str(base), "adapter": "lora", "max_length": 96},
        "data": {"shards": str(root / "shards"), "batches": {"cache_dir": str(root / "cache")}},
        "train": {"epochs": 2, "batch_size": 16},
        "optim": {"lr": 1e-3},
        "evaluate": {"resamples": 20},
        "scaling": {"max_failures": 0},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    store = str(root / "store")
    kept = {**run["model"], "name": "medfuse_llm", "embeddings": store, "width": 16, "heads": 2}
    fused = {**run, "name": "fused", "model": kept}
    (root / "fused.yaml").write_text(yaml.safe_dump(fused), encoding="utf-8")
    notes, tables = hospital / "mimic-iv-note" / "2.2", hospital / "mimiciv" / "2.2"
    where = ["--mimic-iv", str(tables), "--notes", str(notes), "--out", str(root / "shards")]
    where.append(f"admissions.label_file={own}")
    folder = str(root / "runs" / "notes")
    lines = []
    with start_head(num_cpus=2) as head:
        for words, code in (
            (["data", "extract", "--task", "diagnoses", *where], 0),
            (["data", "describe", str(root / "shards")], 0),
            (["train", str(root / "run.yaml")], 0),
            (["train", str(root / "run.yaml"), "name=lost", "optim.lr=1e30"], 2),
            (["evaluate", folder], 0),
            (["report", folder], 0),
            (["export", folder, "--out", str(root / "adapter")], 0),
            (["data", "embed", folder, "--out", store, "--actors", "2"], 0),
            (["train", str(root / "fused.yaml")], 0),
            (["evaluate", str(root / "runs" / "fused")], 0),
        ):
            done = head.rayfuse(*words, RAY_ADDRESS=head.gcs)
            assert done.returncode == code, (words, done.stderr)
            lines += [done.stdout, done.stderr]
        lines += [*_logs(head.folder)]
    return root, "\n".join(lines)


def test_the_run_is_whole(said: tuple[Path, str], base: Path) -> None:
    root, text = said
    scores = json.loads((root / "runs/notes/eval/test/metrics.json").read_text(encoding="utf-8"))
    assert scores["labels"] == list(OWN_LABELS)
    assert "NaN or infinite" in text, "the run that failed said why"
    assert "(hadm_id " in text, "and at which admissions"
    weights = load_file(root / "adapter" / "adapter_model.safetensors")
    assert any(float(value.norm()) > 0 for name, value in weights.items() if "lora_B" in name)
    details = json.loads((root / "adapter" / "rayfuse.json").read_text(encoding="utf-8"))
    assert details["base"] == "tiny"
    assert details["labels"] == list(OWN_LABELS)
    assert not [p for p in (root / "adapter").iterdir() if str(base).encode() in p.read_bytes()]


def test_the_fusion_trains_on_kept_vectors(said: tuple[Path, str]) -> None:
    root, text = said
    stored = re.search(r"(\d+) texts, 0 present, (\d+) computed \((\d+) tokens, ", text)
    assert stored is not None
    assert int(stored[1]) == int(stored[2]) > 20
    scores = json.loads((root / "runs/fused/eval/test/metrics.json").read_text(encoding="utf-8"))
    assert scores["labels"] == list(OWN_LABELS)
    (weights,) = (root / "runs/fused/best").glob("parts-*")
    names = [name for path in weights.iterdir() for name in load_file(path)]
    assert names
    assert not [name for name in names if name.startswith("text.")]


def test_no_word_of_a_note_leaves_the_shards(said: tuple[Path, str]) -> None:
    root, text = said
    assert CANARY not in text
    assert "RayTrainWorker" in text, "the workers' own logs were read"
    shards = [root / "shards" / "shards", root / "cache"]  # the cache is the shards' rows, mapped
    files = [path for path in root.rglob("*") if path.is_file()]
    holding = [path for path in files if CANARY.encode() in _content(path)]
    assert holding, "the search finds what is there"
    outside = [path for path in holding if not any(path.is_relative_to(one) for one in shards)]
    assert outside == []


def _logs(folder: Path) -> Iterator[str]:
    """Of every process of Ray's; files of those that are ending may vanish meanwhile."""
    for place, _, names in os.walk(folder):
        for name in names if "/logs" in place else []:
            with suppress(FileNotFoundError):
                yield Path(place, name).read_text(encoding="utf-8", errors="replace")


def _content(path: Path) -> bytes:
    """A file's bytes; of Parquet, which packs them, the text of its columns."""
    if path.suffix == ".parquet":
        return str(pl.read_parquet(path).to_dicts()).encode()
    return path.read_bytes()
