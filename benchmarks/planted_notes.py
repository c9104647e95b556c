"""What MEDFuse and its parts find of what is planted in synthetic notes and labs.

One command makes docs/planted-notes.md and its JSON: a synthetic hospital, its extraction, the
text branch, the lab branch and their fusions over several seeds on Ray Train, scored label by label
on the test split beside the Bayes scores and two probes that have to be blind; masked lab-test
modelling against the columns' means and against the best there is; and what lambda does to the
information between specific and shared parts, measured by critics trained afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from data.batches import LabColumns
from data.files import atomic_path, write_json, write_text
from data.lab_scaler import fitted as fitted_labs
from data.reader import ShardReader
from data.sources import synthetic
from data.sources.synthetic import items
from data.sources.synthetic.clinical import MODALITY_SETS, NOISE_PAIR, admission_scores
from data.switches import ExtractConfig, Sources
from fusion.encoders.fitted_llama import write_llama
from fusion.layers.present import present_labs
from fusion.losses.held_out import information
from fusion.metrics.imputation import binned_mean, root_mean_squared_error
from fusion.metrics.ranking import auroc
from fusion.metrics.seeds import cell, interval
from ray_jobs import cluster, evaluate, extract, inference, predictions, train
from ray_jobs import config as run_config

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]
    Runs = dict[tuple[str, int], Path]

ROOT = Path(__file__).parents[1]
TASK = "diagnoses"
HOSPITAL = {"renal_coupling": 0.9}
EXTRACT = {"admissions": {"min_visits": 1, "history_visits": 0, "lab_value": "mean"}}
COLUMNS = len(items.LABS)
READS = {"random_weights": True, "adapter": "full", "max_length": 256}
LABS = {"dim": 32, "heads": 4, "encoder_depth": 3}
FUSED: dict[str, Any] = {
    "name": "medfuse_llm", "text": "notes", "labs": LABS, "items": COLUMNS, "width": 32,
    "tokens": 4, "token_width": 16, "heads": 4, "critic_hidden": 64, **READS,
}  # fmt: skip
FROZEN: dict[str, Any] = {
    "epochs": 6, "batch_size": 64, "lr": 1e-3,
    "from": {"text": "notes", "labs": "labs"},
    "group_lr": {"text": 0.0, "labs": 0.0},
}  # fmt: skip
LAMBDAS = (0.0, 0.01, 0.1, 1.0)
NOTES = {"name": "note_llm", "text": "notes", **READS}
MODELS: dict[str, dict[str, Any]] = {
    "mltm": {
        "model": {"name": "mltm", "items": COLUMNS, "decoder_depth": 1, **LABS},
        "epochs": 15, "batch_size": 64, "lr": 2e-3, "selection": "masked",
    },
    "labs": {
        "model": {**FUSED, "text": "labs", "max_length": 8, "fusion": "concat"},
        "epochs": 40, "batch_size": 64, "lr": 1e-3, "from": {"labs": "mltm"},
    },
    "notes": {"model": NOTES, "epochs": 7, "lr": 1e-3},
    "concat": {**FROZEN, "model": {**FUSED, "fusion": "concat"}},
    **{
        f"full-{weight:g}": {
            **FROZEN, "model": {**FUSED, "mi_weight": weight},
            "group_lr": {**FROZEN["group_lr"], "critic": 3e-3},
        }
        for weight in LAMBDAS
    },
    "text": {"model": {**NOTES, "text": "notes_and_labs"}, "epochs": 7, "lr": 1e-3},
}  # fmt: skip
"""In order of training. `labs` reads a text of 8 tokens that is the same for every row."""
KINDS = {
    "arrhythmia (labs)": ("Cardiac arrhythmias",),
    "pulmonary (notes)": ("Chronic pulmonary disease",),
    "renal failure (notes)": ("Renal failure",),
    "fluid, electrolytes (shared)": ("Fluid and electrolyte disorders",),
    "heart failure (both)": ("Congestive heart failure",),
    "valvular (xor)": ("Valvular disease",),
    "four others (noise)": (
        "Hypertension, uncomplicated", "Diabetes w/o chronic complications",
        "Hypertension, complicated", "Other neurological disorders",
    ),
}  # fmt: skip
MEAN = "mean of the six above"
KINDS[MEAN] = sum((names for names in KINDS.values() if len(names) == 1), ())
PAGE = """# Planted notes: what MEDFuse and its parts find in the synthetic hospital

**Synthetic data only.** Made by `python benchmarks/planted_notes.py` (JSON:
`benchmarks/results/planted_notes.json`). AUROC on the same {test_rows} test admissions; {patients}
patients of MIMIC-III's layout, a Llama of two layers and width 64 without pre-training; 95 %
intervals over seeds (Student's t; {seeds}).
What is planted: [synthetic-hospital.md](synthetic-hospital.md), "Notes and labs".

{scores}

`Bayes` is the best any model can do on those modalities. The two probes are logistic regressions
on the same rows: they have to be blind. `notes` and `text` are `note_llm` on notes, and on notes
and the sentence of abnormal results; `mltm` is a linear probe on the vector of masked lab-test
modelling; `labs` the lab encoder, begun from `mltm` and trained whole; `concat` and `full-LAMBDA`
(`fusion: disentangled`) begin from `notes` and `labs`, whose weights stay. What is far below Bayes
is shown as it came out: a failure, or a training too short. Weights, sizes and epochs were chosen
by the validation split.

The paper keeps the lab branch as MLTM left it. Here no result tells another one but for noise
(below), so nothing makes a row's vector hold the products of tests that are planted, and it is
trained on the labels first.

## Masked lab-test modelling
Root mean squared error of hidden values of the test rows, scaled to [0, 1]; the same mask for all.

{imputed}

Of the ten tests only creatinine and urea nitrogen say anything of one another: their sides agree
because this hospital is made with `renal_coupling: 0.9` (by default they do not). All others are
independent, the planted pairs too, as their latent is a fair coin. So the best possible is the
column's mean everywhere but in that pair, when the other one of it is seen. It is the best in the
long run, estimated on train rows: on a few hundred values a model may come out below it by chance.

## What lambda does
Information in nats between (s_a, s_b) and s_c of the test rows by fresh critics, trained afterwards
on one half and measured on the other, standardised: vCLUB is an upper bound where its Gaussian
fits, InfoNCE a lower one, of log 64 = 4.16 at most. The variances say whether a part collapsed.

{shared}
"""
PAIR = "creatinine or urea nitrogen, the other one seen"


def main() -> None:
    """Generate, extract, train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/planted-notes"))
    parser.add_argument("--patients", type=int, default=5000)
    parser.add_argument("--seeds", type=int, default=3)
    told = "score the runs that are finished; train nothing"
    parser.add_argument("--finished", action="store_true", help=told)
    given = parser.parse_args()
    hospital, shards = given.work / "hospital", given.work / "shards"
    if not hospital.is_dir():
        config = synthetic.HospitalConfig.model_validate(HOSPITAL)
        with atomic_path(hospital) as unfinished:
            synthetic.generate(
                unfinished, patients=given.patients, seed=11, release="mimic-iii-1.4", cxr=False,
                chart_events_per_stay=60, config=config,
            )  # fmt: skip
    if not given.finished:
        _train_all(hospital, shards, given)
    result = _score(_finished(given), hospital, shards)
    settings = {"patients": given.patients, "hospital": HOSPITAL, "extract": EXTRACT}
    result["settings"] = {**settings, "models": MODELS}
    write_json(ROOT / "benchmarks" / "results" / "planted_notes.json", result)
    write_text(ROOT / "docs" / "planted-notes.md", page(result))
    sys.stdout.write(json.dumps(result, indent=1, sort_keys=True) + "\n")


def _train_all(hospital: Path, shards: Path, given: argparse.Namespace) -> None:
    sources = Sources(**dict.fromkeys(("mimic_iii", "notes"), hospital / "mimiciii" / "1.4"))
    with cluster.connect(num_cpus=4):
        config = ExtractConfig.model_validate(EXTRACT)
        extract.run(sources, TASK, shards, preset="corrected", config=config)
        reader = ShardReader(shards, None)
        rows = reader.rows_of("train")
        texts = [text for text in (*reader.notes(rows), *reader.lab_texts(rows)) if text]
        write_llama(given.work / "llama", texts, vocabulary=800, width=64, layers=2, heads=4)
        for model in MODELS:
            for seed in range(given.seeds):
                _train(model, seed, shards, given.work)


def _finished(given: argparse.Namespace) -> Runs:
    found = {
        (model, seed): given.work / "runs" / f"{model}-{seed}"
        for model in MODELS for seed in range(given.seeds)
    }  # fmt: skip
    return {
        key: folder for key, folder in found.items()
        if (folder / "eval" / "test" / "metrics.json").is_file()
    }  # fmt: skip


def _train(model: str, seed: int, shards: Path, work: Path) -> None:
    """Train and evaluate; what is there already is not done again."""
    recipe, runs = MODELS[model], work / "runs"
    read = {} if model == "mltm" else {"backbone": str(work / "llama")}
    document = {
        "name": f"{model}-{seed}",
        "runs_dir": str(runs),
        "task": TASK,
        "seed": seed,
        "model": {**recipe["model"], **read},
        "init_from": {
            prefix: str(runs / f"{source}-{seed}")
            for prefix, source in recipe.get("from", {}).items()
        },
        "data": {
            "shards": str(shards),
            "allow_mixed": True,
            "batches": {"labs": {"top": COLUMNS}, "cache_dir": str(work / "cache")},
        },
        "optim": {
            "name": "adamw", "lr": recipe["lr"], "weight_decay": 0.01, "clip_norm": 1.0,
            "schedule": "cosine", "warmup": 0.06, "group_lr": recipe.get("group_lr", {}),
        },
        "train": {
            "epochs": recipe["epochs"], "patience": recipe["epochs"],
            "batch_size": recipe.get("batch_size", 32),
            "selection_metric": recipe.get("selection", "auroc"),
        },
        "evaluate": {"resamples": 20},
    }  # fmt: skip
    folder = train.run(run_config.from_document(document, place=model))
    if not (folder / "eval" / "test" / "metrics.json").is_file():
        evaluate.run(folder)


def _score(folders: dict[tuple[str, int], Path], hospital: Path, shards: Path) -> dict[str, Any]:
    """AUROC of each label's kind on the test rows, with intervals over seeds; and the rest."""
    models: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    admissions: list[int] = []
    for (model, _), folder in folders.items():
        found = predictions.read(folder / "eval" / "test" / "predictions.parquet")
        admissions = found.keys["hadm_id"].to_pylist()
        for kind, value in _by_kind(found.targets, found.probabilities, found.labels).items():
            models[kind].setdefault(model, []).append(value)
    best = {row["label"]: row for row in admission_scores(hospital, hadm_ids=admissions).to_dicts()}
    return {
        "test_rows": len(admissions),
        "seeds": {model: len(values) for model, values in next(iter(models.values())).items()},
        "bayes": {
            kind: {name: float(np.mean([best[label][name] for label in labels]))
                   for name in MODALITY_SETS}
            for kind, labels in KINDS.items()
        },
        "probes": _probes(shards),
        "models": {
            kind: {model: interval(values) for model, values in found.items()}
            for kind, found in models.items()
        },
        "imputation": _over_seeds(
            [_imputation(folder) for (model, _), folder in folders.items() if model == "mltm"]
        ),
        "information": {
            name: _over_seeds(
                [_shared(folder) for (model, _), folder in folders.items() if model == name]
            )
            for name in dict.fromkeys(model for model, _ in folders)
            if name.startswith("full")
        },
    }  # fmt: skip


def _by_kind(targets: Any, scores: Any, labels: tuple[str, ...]) -> dict[str, float]:
    each = dict(zip(labels, auroc(targets, scores), strict=True))
    return {kind: float(np.mean([each[name] for name in names])) for kind, names in KINDS.items()}


def _probes(shards: Path) -> dict[str, dict[str, float]]:
    """What a logistic regression makes of the words, and of the lab means, of the same rows."""
    reader = ShardReader(shards, None)
    rows = {split: reader.rows_of(split) for split in ("train", "test")}
    notes = {split: [note or "" for note in reader.notes(own)] for split, own in rows.items()}
    count = CountVectorizer().fit(notes["train"])
    labs = {split: _lab_matrix(reader, own) for split, own in rows.items()}
    seen = np.where(labs["train"][1], labs["train"][0], np.nan)
    centre, spread = np.nanmean(seen, axis=0), np.nanstd(seen, axis=0)
    features = {
        "bag of words": [count.transform(notes[split]) for split in rows],
        "lab means": [np.where(o, (x - centre) / spread, 0.0) for x, o in labs.values()],
    }
    keys = reader.keys()
    targets = {split: np.array(keys["labels"].to_pylist())[own] for split, own in rows.items()}
    return {
        name: _by_kind(targets["test"], logistic(x, targets["train"], at), reader.manifest.labels)
        for name, (x, at) in features.items()
    }


def logistic(train_rows: Any, targets: Any, test_rows: Any) -> Matrix:
    """[N, C] decision values on the test rows of one logistic regression a label."""
    fits = [LogisticRegression(max_iter=500).fit(train_rows, column) for column in targets.T]
    return np.stack([fit.decision_function(test_rows) for fit in fits], axis=1)


def _lab_matrix(reader: ShardReader, rows: Any) -> tuple[Any, Any]:
    return fitted_labs(reader, LabColumns(top=COLUMNS)).apply(reader.lab_values(rows))


@torch.no_grad()
def _imputation(folder: Path) -> dict[str, float]:
    """Root mean squared error of the test rows' hidden values: the model's, of means, the best.

    The best is exact up to its estimate: apart from the coupled pair no test says anything of
    another, and of that pair each is told by the other's value, in 20 quantiles of train rows.
    """
    trained = inference.load(folder)
    model: Any = trained.model.eval()
    stream = inference.open_split(trained, "test")
    reader = stream.reader
    x, seen = _lab_matrix(reader, reader.rows_of("train"))
    columns = fitted_labs(reader, trained.config.data.batches.labs).columns
    number = {item.label: str(item.itemid) for item in items.LABS}
    one, other = ([c.item for c in columns].index(number[name]) for name in NOISE_PAIR)
    means = np.array([x[seen[:, k], k].mean() for k in range(len(columns))])
    parts = []
    for batch in stream.epoch(0):
        assert batch is not None
        labs, known = present_labs(batch, model.config.items)
        mask = model.mask(batch, known)
        encoded = model.labs(labs, known & ~mask)
        tensors = (labs, known, mask, model.decoder(encoded.tokens, encoded.mask))
        parts.append([tensor.numpy()[:, : len(columns)] for tensor in tensors])
    stream.close()
    values, observed, hidden, told = (np.concatenate(part) for part in zip(*parts, strict=True))
    best = np.tile(means, (len(values), 1))
    partner = np.zeros_like(hidden)
    for k, by in ((one, other), (other, one)):
        partner[:, k] = (observed & ~hidden)[:, by]
        both = seen[:, k] & seen[:, by]
        guess = binned_mean(x[both, by], x[both, k], values[:, by])
        best[:, k] = np.where(partner[:, k], guess, best[:, k])
    out = {}
    for name, chosen in (("all", hidden), ("pair", hidden & partner)):
        for source, guess in (("mltm", told), ("means", means), ("best", best)):
            out[f"{name} {source}"] = root_mean_squared_error(guess, values, chosen)
    return out


def _shared(folder: Path) -> dict[str, float]:
    """Information between (s_a, s_b) and s_c of the test rows, and the mean variance of each."""
    trained = inference.load(folder)
    stream = inference.open_split(trained, "test")
    found = inference.predict(trained, stream, features=True).features
    stream.close()
    s = [torch.from_numpy(found[name]) for name in ("text_specific", "labs_specific", "shared")]
    told = information(torch.cat(s[:2], 1), s[2])
    names = ("variance s_a", "variance s_b", "variance s_c")
    return told | {name: float(value.var(0).mean()) for name, value in zip(names, s, strict=True)}


def _over_seeds(found: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: interval([one[name] for one in found]) for name in (found or [{}])[0]}


def page(result: dict[str, Any]) -> str:
    """docs/planted-notes.md."""
    models = list(result["seeds"])
    scores = [
        [kind, *(f"{result['bayes'][kind][name]:.3f}" for name in MODALITY_SETS)]
        + [f"{result['probes'][name][kind]:.3f}" for name in result["probes"]]
        + [cell(result["models"][kind][name]) for name in models]
        for kind in KINDS
    ]
    imputed = [
        [title, *(cell(result["imputation"][f"{name} {by}"]) for by in ("mltm", "means", "best"))]
        for name, title in (("all", "every hidden value"), ("pair", PAIR))
    ]
    measures = list(next(iter(result["information"].values()), {}))
    shared = [
        [
            name.removeprefix("full-"),
            cell(result["models"][MEAN][name]),
            *(cell(found[measure]) for measure in measures),
        ]
        for name, found in result["information"].items()
    ]
    heads = ["label (planted in)", *(f"Bayes {name}" for name in MODALITY_SETS)]
    return PAGE.format(
        test_rows=result["test_rows"],
        patients=result["settings"]["patients"],
        seeds=", ".join(f"{model} {count}" for model, count in result["seeds"].items()),
        scores=_table([*heads, *result["probes"], *models], scores),
        imputed=_table(["hidden values", "MLTM", "columns' means", "best possible"], imputed),
        shared=_table(["lambda", "mean AUROC", *measures], shared),
    )


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
