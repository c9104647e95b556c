"""Everything computed of one set of rows, and of its subgroups; the difference of two models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.metrics.bootstrap import METRICS, Interval, Metric, Scores, bootstrap, interval
from fusion.metrics.calibration import calibration
from fusion.metrics.decisions import HALF, decisions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from fusion.metrics.config import EvaluateConfig

AGE_BANDS: tuple[tuple[str, float, float], ...] = (
    ("[18, 40)", 18, 40),
    ("[40, 60)", 40, 60),
    ("[60, 80)", 60, 80),
    ("[80, +)", 80, np.inf),
)


def score_set(
    targets: NDArray[Any],
    probabilities: NDArray[Any],
    subjects: NDArray[Any],
    *,
    config: EvaluateConfig,
    label_types: Sequence[str] = (),
    tuned: NDArray[np.float64] | None = None,
) -> dict[str, Any]:
    """Scores with intervals, calibration and decisions of one set of rows.

    With `macro_interval: mean_of_labels` every interval is resampled by row and a mean's bounds
    are the means of its labels' bounds, as the papers have it; otherwise by patient.

    Args:
        targets: [N, C], 0 or 1.
        probabilities: [N, C].
        subjects: [N], the patient of each row.
        config: Resamples, seed, kind of macro interval, bins.
        label_types: [C] types whose means are also given, or ().
        tuned: [C] thresholds chosen on other rows, for a second account of decisions.

    Returns:
        JSON: rows, patients, positives per label, resampled_by, `metrics` (auroc, auprc, brier:
        macro, micro, labels, types), `calibration` (micro, labels) and `decisions` (half and,
        where given, tuned: `fusion.metrics.decisions`).
    """
    targets = np.asarray(targets)
    probabilities = np.asarray(probabilities, np.float64)
    by_row = config.macro_interval == "mean_of_labels"
    scores = bootstrap(
        targets,
        probabilities,
        None if by_row else subjects,
        resamples=config.resamples,
        seed=config.seed,
    )
    bins = config.calibration_bins
    thresholds = {"half": np.full(targets.shape[1], HALF)}
    if tuned is not None:
        thresholds["tuned"] = tuned
    return {
        **_head(targets, subjects),
        "resampled_by": "row" if by_row else "patient",
        "resamples": config.resamples,
        "metrics": {m: _metric(scores, m, label_types, by_row=by_row) for m in METRICS},
        "decisions": {
            name: decisions(
                targets,
                probabilities,
                None if by_row else subjects,
                thresholds=chosen,
                resamples=config.resamples,
                seed=config.seed,
            )
            for name, chosen in thresholds.items()
        },
        "calibration": {
            "micro": calibration(targets.ravel(), probabilities.ravel(), bins),
            "labels": [
                calibration(target, score, bins)
                for target, score in zip(targets.T, probabilities.T, strict=True)
            ],
        },
    }


def score_subgroups(
    targets: NDArray[Any],
    probabilities: NDArray[Any],
    subjects: NDArray[Any],
    memberships: dict[str, NDArray[np.bool_]],
    *,
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Macro and micro scores of each named subgroup ([N] bool); a group without rows has none."""
    by_row = config.macro_interval == "mean_of_labels"
    groups: dict[str, Any] = {}
    for name, member in memberships.items():
        head = _head(targets[member], subjects[member])
        if not member.any():
            groups[name] = {**head, "metrics": None}
            continue
        scores = bootstrap(
            targets[member],
            probabilities[member],
            None if by_row else subjects[member],
            resamples=config.resamples,
            seed=config.seed,
        )
        groups[name] = {
            **head,
            "metrics": {
                metric: {
                    "macro": _mean(scores, metric, None, by_row=by_row).to_json(),
                    "micro": scores.label(metric, -1).to_json(),
                }
                for metric in METRICS
            },
        }
    return groups


def age_band_members(age: NDArray[np.floating]) -> dict[str, NDArray[np.bool_]]:
    """The rows [N] of each of the MedFuse paper's age bands; NaN is in none."""
    return {name: (age >= low) & (age < high) for name, low, high in AGE_BANDS}


def paired_difference(
    targets: NDArray[Any],
    first: NDArray[Any],
    second: NDArray[Any],
    subjects: NDArray[Any],
    *,
    config: EvaluateConfig,
) -> dict[str, Any]:
    """First minus second on the same rows: both models see the same resampled patients.

    Returns:
        JSON: metric -> {macro, micro, labels}, each an interval of the difference.
    """
    scores = [
        bootstrap(targets, scored, subjects, resamples=config.resamples, seed=config.seed)
        for scored in (first, second)
    ]
    result: dict[str, Any] = {}
    for metric in METRICS:
        point = scores[0].point[metric] - scores[1].point[metric]
        draws = scores[0].draws[metric] - scores[1].draws[metric]
        both = Scores({metric: point}, {metric: draws})
        result[metric] = {
            "macro": both.mean(metric).to_json(),
            "micro": interval(float(point[-1]), draws[-1]).to_json(),
            "labels": [both.label(metric, c).to_json() for c in range(len(point) - 1)],
        }
    return result


def _head(targets: NDArray[Any], subjects: NDArray[Any]) -> dict[str, Any]:
    return {
        "rows": len(targets),
        "patients": len(np.unique(subjects)),
        "positives": [int(count) for count in targets.sum(0)],
    }


def _metric(
    scores: Scores, metric: Metric, label_types: Sequence[str], *, by_row: bool
) -> dict[str, Any]:
    types = {
        kind: [c for c, one in enumerate(label_types) if one == kind]
        for kind in dict.fromkeys(label_types)
    }
    return {
        "macro": _mean(scores, metric, None, by_row=by_row).to_json(),
        "micro": scores.label(metric, -1).to_json(),
        "labels": [scores.label(metric, c).to_json() for c in range(scores.n_labels)],
        "types": {
            kind: _mean(scores, metric, members, by_row=by_row).to_json()
            for kind, members in types.items()
        },
    }


def _mean(
    scores: Scores, metric: Metric, labels: Sequence[int] | None, *, by_row: bool
) -> Interval:
    return scores.mean_of_labels(metric, labels) if by_row else scores.mean(metric, labels)
