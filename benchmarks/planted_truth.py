"""Do the models find what is planted in the synthetic hospital, and no more?

One command makes docs/planted-truth.md and its JSON: a synthetic hospital, its extraction, every
model over several seeds on Ray Train, scored on the test split by kind of label against the oracle
and the Bayes scores of the same rows; and how each degrades as X-rays are withheld.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from data.files import atomic_path, write_json, write_text
from data.sources import synthetic
from data.sources.synthetic.planting import MORTALITY, PLANTED
from data.switches import ExtractConfig, Sources
from fusion.metrics.ranking import auroc
from fusion.metrics.seeds import cell, interval
from ray_jobs import cluster, evaluate, extract, predictions, train
from ray_jobs import config as run_config

ROOT = Path(__file__).parents[1]
TASK = "phenotyping_48h"
IMAGE_SIZE = 64
SMALL = {"depth": 10, "base_width": 16}
MODELS: dict[str, dict[str, Any]] = {
    "lstm": {"model": {"name": "lstm", "hidden": 64}, "epochs": 24},
    "resnet": {"model": {"name": "resnet34", **SMALL}, "epochs": 8},
    "early_zeros": {
        "model": {"name": "early_fusion", "missing": "zeros", "hidden": 64, **SMALL},
        "epochs": 6,
        "from": {"ehr_encoder": "lstm", "cxr_encoder": "resnet"},
    },
    "medfuse": {
        "model": {"name": "medfuse", "hidden": 64, "fusion_hidden": 128, **SMALL},
        "epochs": 10,
        "from": {"ehr_encoder": "lstm", "cxr_encoder": "resnet"},
    },
    "drfuse": {
        "model": {"name": "drfuse", "hidden": 64, "dropout": 0.1, "feedforward": 128, **SMALL},
        "epochs": 40,
    },
}
"""In order of training: MedFuse as in its paper from pre-trained encoders, DrFuse from scratch."""
KINDS = ("ehr", "cxr", "both", "xor", "neither")
KIND_OF = {planted.name: planted.kind for planted in PLANTED}
REFERENCES = ("oracle", "ehr", "cxr", "ehr+cxr", "late")
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def main() -> None:
    """Generate, extract, train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/planted-truth"))
    parser.add_argument("--patients", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=list(MODELS),
        help="train only these, and leave the page to a run with --finished",
    )
    parser.add_argument(
        "--finished", action="store_true", help="score the runs that are finished; train nothing"
    )
    given = parser.parse_args()
    hospital = given.work / "hospital"
    if not hospital.is_dir():
        with atomic_path(hospital) as unfinished:
            synthetic.generate(
                unfinished,
                patients=given.patients,
                seed=11,
                release="mimic-iv-2.2",
                image_size=IMAGE_SIZE,
                notes=False,
                chart_events_per_stay=400,
            )
    folders = _finished(given) if given.finished else _train_all(hospital, given)
    if set(given.models) != set(MODELS):
        return
    result = _score(folders, hospital)
    result["settings"] = {
        "patients": given.patients,
        "seeds": given.seeds,
        "models": MODELS,
    }
    write_json(ROOT / "benchmarks" / "results" / "planted_truth.json", result)
    write_text(ROOT / "docs" / "planted-truth.md", page(result))
    sys.stdout.write(json.dumps(result, indent=1, sort_keys=True) + "\n")


def _train_all(hospital: Path, given: argparse.Namespace) -> dict[tuple[str, int], Path]:
    sources = Sources(
        mimic_iv=hospital / "mimiciv" / "2.2", mimic_cxr=hospital / "mimic-cxr-jpg" / "2.0.0"
    )
    shards = given.work / "shards"
    with cluster.connect(num_cpus=max(4, given.workers + 2)):
        extract.run(sources, TASK, shards, preset="corrected", config=ExtractConfig())
        return {
            (model, seed): _train(model, seed, shards, given)
            for model in given.models
            for seed in range(given.seeds)
        }


def _finished(given: argparse.Namespace) -> dict[tuple[str, int], Path]:
    found = {
        (model, seed): given.work / "runs" / f"{model}-{seed}"
        for model in MODELS
        for seed in range(given.seeds)
    }
    return {
        key: folder
        for key, folder in found.items()
        if (folder / "eval" / "test" / "metrics.json").is_file()
    }


def _train(model: str, seed: int, shards: Path, given: argparse.Namespace) -> Path:
    """A finished and evaluated run; what is there already is not done again."""
    recipe = MODELS[model]
    runs = given.work / "runs"
    document = {
        "name": f"{model}-{seed}",
        "runs_dir": str(runs),
        "task": TASK,
        "seed": seed,
        "model": recipe["model"],
        "init_from": {
            prefix: str(runs / f"{source}-{seed}")
            for prefix, source in recipe.get("from", {}).items()
        },
        "data": {
            "shards": str(shards),
            "batches": {
                "withhold_cxr": 0.0,
                "image": {"resize": IMAGE_SIZE, "size": IMAGE_SIZE, "augment": False},
            },
        },
        "optim": {"lr": 1e-3, "clip_norm": 1.0},
        "train": {
            "epochs": recipe["epochs"],
            "patience": recipe["epochs"],
            "batch_size": 32,
        },
        "scaling": {"num_workers": given.workers},
        "evaluate": {"withhold_cxr": SHARES, "resamples": 200},
    }
    folder = train.run(run_config.from_document(document, place=model))
    if not (folder / "eval" / "test" / "metrics.json").is_file():
        evaluate.run(folder)
    return folder


def _score(folders: dict[tuple[str, int], Path], hospital: Path) -> dict[str, Any]:
    """Mean AUROC of each kind's labels on the PAIRED test rows, with intervals over seeds."""
    scores: dict[str, dict[str, list[float]]] = {}
    stays: set[int] = set()
    for (model, _), folder in folders.items():
        found = predictions.read(folder / "eval" / "test" / "predictions.parquet")
        paired = found.has_cxr
        stays = set(found.keys["stay_id"].to_numpy()[paired].tolist())
        each = auroc(found.targets[paired], found.probabilities[paired])
        kinds = np.array([KIND_OF[name] for name in found.labels])
        for kind in KINDS:
            value = float(np.nanmean(each[kinds == kind]))
            scores.setdefault(kind, {}).setdefault(model, []).append(value)
    truth = synthetic.truth_scores(hospital, stays=stays).filter(pl.col("label") != MORTALITY)
    best = truth.group_by("kind").agg(pl.col("oracle", *REFERENCES[1:]).mean())
    reference = {row.pop("kind"): row for row in best.to_dicts()}
    return {
        "test_rows": len(stays),
        "seeds": {model: len(values) for model, values in scores["ehr"].items()},
        "reference": reference,
        "models": {
            kind: {model: interval(values) for model, values in scores[kind].items()}
            for kind in KINDS
        },
        "share_of_bayes_gain": {
            kind: _gain(reference[kind], scores[kind]) for kind in ("both", "xor")
        },
        "withheld": _withheld(folders),
    }


def _gain(
    reference: dict[str, float], scores: dict[str, list[float]]
) -> dict[str, dict[str, float]]:
    """(model - best uni-modal Bayes) / (joint Bayes - best uni-modal Bayes), of fusion models."""
    alone = max(reference["ehr"], reference["cxr"])
    room = reference["ehr+cxr"] - alone
    return {
        model: interval([(value - alone) / room for value in values])
        for model, values in scores.items()
        if model not in ("lstm", "resnet")
    }


def _withheld(folders: dict[tuple[str, int], Path]) -> dict[str, dict[str, dict[str, float]]]:
    """Macro AUROC of the paired test rows by the share of them whose X-ray is withheld."""
    curves: dict[str, dict[str, list[float]]] = {}
    for (model, _), folder in folders.items():
        metrics = json.loads((folder / "eval" / "test" / "metrics.json").read_text("utf-8"))
        for point in metrics["missingness"]:
            macro = point["metrics"]["auroc"]["macro"]["value"]
            curves.setdefault(model, {}).setdefault(f"{point['share']:.2f}", []).append(macro)
    return {
        model: {share: interval(values) for share, values in curve.items()}
        for model, curve in curves.items()
    }


def page(result: dict[str, Any]) -> str:
    """docs/planted-truth.md."""
    models = [name for name in MODELS if name in result["models"]["ehr"]]
    lines = [
        "# Planted truth: what the models find in the synthetic hospital",
        "",
        "**Synthetic data only.** Made by `python benchmarks/planted_truth.py` (JSON:",
        "`benchmarks/results/planted_truth.json`). Mean AUROC of each kind's labels on the same",
        f"{result['test_rows']} test stays that have an X-ray; {result['settings']['patients']} "
        f"patients, images of {IMAGE_SIZE} pixels, small networks; 95 % intervals over seeds",
        "(Student's t; "
        + ", ".join(f"{model}: {count}" for model, count in result["seeds"].items())
        + "). The generative model: [synthetic-hospital.md](synthetic-hospital.md).",
        "",
        "| planted in | oracle | Bayes ehr | Bayes cxr | Bayes both | late averaging | "
        + " | ".join(models)
        + " |",
        "|---" * (6 + len(models)) + "|",
    ]
    for kind in KINDS:
        reference = result["reference"][kind]
        cells = [f"{reference[name]:.3f}" for name in REFERENCES]
        cells += [cell(result["models"][kind][model]) for model in models]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "`oracle` knows the latents; `Bayes` is the best any model can do on the clean observed",
        "features of those modalities; `late averaging` is the mean of the two uni-modal Bayes",
        "scores.",
        "",
        "Epochs: " + ", ".join(_epochs(model) for model in MODELS) + ".",
        "What is far below Bayes is shown as it came out: a failure, or a training too short.",
        "",
        "## Share of the Bayes gain over the best uni-modal Bayes score",
        "1 is all there is to gain from fusing; 0 is no better than the best single modality.",
        "",
        "| planted in | " + " | ".join(result["share_of_bayes_gain"]["both"]) + " |",
        "|---" * (1 + len(result["share_of_bayes_gain"]["both"])) + "|",
    ]
    for kind, gains in result["share_of_bayes_gain"].items():
        lines.append(f"| {kind} | " + " | ".join(cell(gain) for gain in gains.values()) + " |")
    shares = [f"{share:.2f}" for share in SHARES]
    lines += [
        "",
        "## When X-rays are withheld",
        "Macro AUROC over the 25 labels on the same rows, by the share whose X-ray is withheld.",
        "Then `medfuse` reads a sequence of length one, `early_zeros` zeros, and `drfuse` attends",
        "to two representations of three.",
        "",
        "| model | " + " | ".join(shares) + " |",
        "|---" * (1 + len(shares)) + "|",
    ]
    for model, curve in result["withheld"].items():
        lines.append(f"| {model} | " + " | ".join(cell(curve[share]) for share in shares) + " |")
    return "\n".join([*lines, "", *_order(result["withheld"]), ""])


def _epochs(model: str) -> str:
    recipe = MODELS[model]
    started = " and ".join(recipe.get("from", {}).values())
    return f"{model} {recipe['epochs']}" + (f" (encoders from {started})" if started else "")


def _order(curves: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Which differences at full withholding the intervals allow to state."""
    last = {model: curve[f"{SHARES[-1]:.2f}"] for model, curve in curves.items()}
    stated = [
        f"- With every X-ray withheld, `{better}` is above `{worse}`: the intervals are apart."
        for better, high in last.items()
        for worse, low in last.items()
        if high["lower"] > low["upper"]
    ]
    return stated or ["With every X-ray withheld the intervals overlap: no order is stated."]


if __name__ == "__main__":
    main()
