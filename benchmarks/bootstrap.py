"""The bootstrap's CPU time on a core against sklearn on the rows that each resample repeats.

Prints JSON. The naive form is timed on a few resamples and scaled; both see the same resamples,
and the largest difference between their scores is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from fusion.metrics.bootstrap import bootstrap


def made_up(rows: int, labels: int, patients: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets of 5 to 45 % prevalence, probabilities that know something, patients."""
    rng = np.random.default_rng(0)
    targets = (rng.random((rows, labels)) < np.linspace(0.05, 0.45, labels)).astype(np.int64)
    logits = rng.normal(size=(rows, labels)) + targets
    return targets, 1 / (1 + np.exp(-logits)), rng.integers(0, patients, rows)


def naive(
    targets: np.ndarray, scores: np.ndarray, subjects: np.ndarray, resamples: int
) -> np.ndarray:
    """[resamples, 2, C]: AUROC and average precision, one sklearn call each."""
    names = np.unique(subjects)
    rows_of = [np.flatnonzero(subjects == name) for name in names]
    generator = np.random.default_rng(0)
    found = np.empty((resamples, 2, targets.shape[1]))
    for r in range(resamples):
        drawn = generator.integers(0, len(names), len(names))
        rows = np.concatenate([rows_of[patient] for patient in drawn])
        for c in range(targets.shape[1]):
            found[r, 0, c] = roc_auc_score(targets[rows, c], scores[rows, c])
            found[r, 1, c] = average_precision_score(targets[rows, c], scores[rows, c])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=12_000)
    parser.add_argument("--labels", type=int, default=25)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--naive-resamples", type=int, default=10)
    options = parser.parse_args()
    targets, scores, subjects = made_up(options.rows, options.labels, options.rows * 3 // 4)

    started = time.process_time()
    fast = bootstrap(targets, scores, subjects, resamples=options.resamples)
    seconds = time.process_time() - started
    started = time.process_time()
    slow = naive(targets, scores, subjects, options.naive_resamples)
    naive_seconds = time.process_time() - started
    scaled = naive_seconds * options.resamples / options.naive_resamples
    both = (fast.draws["auroc"], fast.draws["auprc"])
    difference = max(
        float(np.abs(draws[:-1, : len(slow)].T - slow[:, m]).max()) for m, draws in enumerate(both)
    )
    print(
        json.dumps(
            {
                "benchmark": "bootstrap",
                "rows": options.rows,
                "labels": options.labels,
                "resamples": options.resamples,
                "scores": "AUROC, AUPRC, Brier of each label and micro, by patient",
                "cpu_seconds": round(seconds, 2),
                "naive": "sklearn, AUROC and AUPRC of each label, no micro",
                "naive_cpu_seconds_scaled": round(scaled, 1),
                "ratio_naive_to_ours": round(scaled / seconds, 1),
                "largest_difference": difference,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
