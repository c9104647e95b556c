"""The MedFuse paper's Ensemble: a fusion run for rows with an X-ray, another for the rest."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from data.errors import InputError
from data.files import write_json
from ray_jobs import predictions as prediction_file
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from pathlib import Path

    from ray_jobs.predictions import Predictions

_log = logging.getLogger(__name__)
_SHARED = ("task", "preset", "split", "manifest")


def run(paired: Path, unpaired: Path, out: Path, *, split: str = "test") -> dict[str, Any]:
    """Pool the predictions of two evaluated runs and score them once (MedFuse, section 4.3).

    `out` becomes a folder that `rayfuse report` shows and compares like a run's: the config and
    environment of `paired` under the name of `out`, and eval/<split>/ with predictions.parquet and
    metrics.json. Nothing is trained or predicted, so it has no training curve and no sweep.

    Args:
        paired: The evaluated run that predicts rows with an X-ray.
        unpaired: The evaluated run that predicts the other rows.
        out: The ensemble's folder; absent, or an earlier ensemble of any two runs.
        split: The evaluated split of both.

    Returns:
        What metrics.json holds.

    Raises:
        InputError: A run was not evaluated on the split, the two did not score the same rows, or
            `out` is the folder of a trained run.
    """
    from ray_jobs import config as run_config
    from ray_jobs.evaluate import METRICS_FILE, score_predictions
    from ray_jobs.inference import load_config

    if RunFolder(out).best.exists() or RunFolder(out).checkpoints.exists():
        raise InputError(f"{out}: the folder of a trained run; name another for the ensemble")
    first, second = (
        prediction_file.read(RunFolder(each).evaluation(split) / prediction_file.FILE_NAME)
        for each in (paired, unpaired)
    )
    config = load_config(paired)
    config = config.model_copy(update={"name": out.name, "runs_dir": out.parent})
    pooled = pool(first, second, name=out.name)
    _log.info("%s: %d resamples of each set", out.name, config.evaluate.resamples)
    metrics = score_predictions(config, pooled)
    folder = RunFolder(out).evaluation(split)
    prediction_file.write(folder / prediction_file.FILE_NAME, pooled)
    write_json(folder / METRICS_FILE, metrics)
    run_config.dump(config, RunFolder(out).config)
    return metrics


def pool(paired: Predictions, unpaired: Predictions, *, name: str) -> Predictions:
    """Rows with an X-ray as `paired` predicts them, the others as `unpaired` does.

    Raises:
        InputError: The two did not score the same rows of the same shards.
    """
    runs = [each.lineage["run"] for each in (paired, unpaired)]
    differing = [key for key in _SHARED if paired.lineage[key] != unpaired.lineage[key]]
    orders = prediction_file.same_rows(paired, unpaired)
    if differing or orders is None:
        cause = f"differ in {', '.join(differing)}" if differing else "did not score the same rows"
        raise InputError(
            f"{runs[0]} and {runs[1]} {cause}, so their predictions cannot be pooled; evaluate "
            "both on the same shards and split"
        )
    first, second = orders
    keys = paired.keys.take(first)
    with_image = paired.has_cxr[first]
    probabilities = np.where(
        with_image[:, None], paired.probabilities[first], unpaired.probabilities[second]
    )
    lineage = {
        **paired.lineage,
        "run": name,
        "model": f"ensemble of {paired.lineage['model']} and {unpaired.lineage['model']}",
        "allow_mixed": paired.lineage["allow_mixed"] or unpaired.lineage["allow_mixed"],
        "paired_rows_from": runs[0],
        "unpaired_rows_from": runs[1],
        "unpaired_weights": unpaired.lineage["weights"],
    }
    return replace(
        paired,
        keys=keys,
        probabilities=probabilities.astype(np.float32),
        targets=paired.targets[first],
        lineage=lineage,
    )
