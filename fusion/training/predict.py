"""From a model and rows to predictions, and from predictions to the score that selects."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data.errors import InputError
from fusion.metrics import ranking
from fusion.metrics.calibration import expected_calibration_error
from fusion.metrics.decisions import macro_f1
from fusion.training.config import SCORES, TrainConfig
from fusion.training.objective import autocast, images_last

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from data.schema import Batch
    from fusion.model import FusionModel, Output
    from fusion.tasks import Task

FP32 = TrainConfig()


@dataclass(frozen=True)
class Predictions:
    """What a model says of N rows.

    Attributes:
        rows: [N] int64, indices into the manifest.
        targets: [N, C] float32.
        logits: [N, C] float32.
        probabilities: [N, C] float32.
        loss: The task's loss summed over the rows.
        counted: For each term that the model counts, its sum and the number of its values.
        features: Named representations, [N, ...] each.
    """

    rows: np.ndarray
    targets: np.ndarray
    logits: np.ndarray
    probabilities: np.ndarray
    loss: float = 0.0
    counted: dict[str, tuple[float, float]] = field(default_factory=dict)
    features: dict[str, np.ndarray] = field(default_factory=dict)

    def sorted(self) -> Predictions:
        """The same predictions in the order of their rows."""
        order = np.argsort(self.rows, kind="stable")
        return Predictions(
            rows=self.rows[order],
            targets=self.targets[order],
            logits=self.logits[order],
            probabilities=self.probabilities[order],
            loss=self.loss,
            counted=self.counted,
            features={name: value[order] for name, value in self.features.items()},
        )


@torch.no_grad()
def predict(
    model: FusionModel,
    batches: Iterable[Batch | None],
    task: Task,
    *,
    config: TrainConfig = FP32,
    features: Sequence[str] = (),
    forward: Callable[[Batch], Output] | None = None,
    filler: Batch | None = None,
) -> Predictions:
    """Run a model over batches in evaluation mode, on the device where it lives.

    Args:
        model: Left in the mode it was in.
        batches: None is an empty share.
        task: Turns logits into probabilities.
        config: Precision and memory format.
        features: Names of `Output.features` to keep.
        forward: The model's forward pass where it is wrapped.
        filler: What an empty share runs, without a trace in the result, so that every worker runs
            as many passes; without it an empty share is passed over.

    Returns:
        Predictions in the order of the batches.
    """
    device = next(model.parameters()).device
    parts: list[dict[str, Any]] = []
    loss = 0.0
    counted = dict.fromkeys(model.counted, (0.0, 0.0))
    training = {module: module.training for module in model.modules()}
    model.eval()
    for batch in batches:
        rows = filler if batch is None else batch
        if rows is None:
            continue
        moved = rows.to(device, non_blocking=True)
        with autocast(device, config):
            output = (forward or model)(images_last(moved, config))
        if batch is None:
            continue
        logits = output.logits.float()
        loss += float(task.loss(logits, moved).sum)
        for (name, (total, count)), more in zip(counted.items(), model.counts(batch), strict=True):
            counted[name] = total + float(output.terms[name].sum), count + float(more)
        arrays = {"logits": logits, "probabilities": task.probabilities(logits)}
        arrays |= {f"features/{name}": output.features[name].float() for name in features}
        part = {name: value.cpu().numpy() for name, value in arrays.items()}
        parts.append({**part, "targets": batch.targets.cpu().numpy(), "rows": batch.rows})
    for module, mode in training.items():
        module.training = mode
    return replace(_joined(parts, len(task.spec.labels)), loss=loss, counted=counted)


def merge(parts: Sequence[Predictions]) -> Predictions:
    """Predictions of several workers as one, in the order of the rows."""
    named = set().union(*(part.features for part in parts))
    filled = [part for part in parts if len(part.rows)] or list(parts[:1])
    return Predictions(
        rows=np.concatenate([part.rows for part in filled]),
        targets=np.concatenate([part.targets for part in filled]),
        logits=np.concatenate([part.logits for part in filled]),
        probabilities=np.concatenate([part.probabilities for part in filled]),
        loss=sum(part.loss for part in parts),
        counted={
            name: tuple(np.sum([part.counted[name] for part in parts], axis=0).tolist())
            for name in parts[0].counted
        },
        features={name: np.concatenate([part.features[name] for part in filled]) for name in named},
    ).sorted()


def selection_score(targets: np.ndarray, probabilities: np.ndarray, metric: str) -> float:
    """The macro mean over labels of a score; AUROC and AUPRC leave out labels of one class.

    Raises:
        InputError: No label has both classes.
    """
    value = _macro(targets, probabilities, metric)
    if np.isnan(value):
        raise InputError(
            f"the validation split ({len(targets)} rows) has no label with both classes, so it "
            "cannot select a checkpoint; extract more patients or change the split"
        )
    return value


def validation_scores(predictions: Predictions, metric: str) -> dict[str, float]:
    """What a validation line holds: the selection metric first, then the others.

    AUROC, average precision, F1 at 0.5 and expected calibration error, each the macro mean over
    labels, and the means of the terms that the model counts.

    Raises:
        InputError: No label has both classes, or the term that selects has no value.
    """
    targets, probabilities = predictions.targets, predictions.probabilities
    if metric in SCORES:
        scores = {metric: selection_score(targets, probabilities, metric)}
    elif predictions.counted[metric][1]:
        total, count = predictions.counted[metric]
        scores = {metric: total / count}
    else:
        raise InputError(
            f"the validation split ({len(targets)} rows) has no value of {metric}, so it cannot "
            "select a checkpoint; extract more patients or change the split"
        )
    others = {name: _macro(targets, probabilities, name) for name in SCORES if name != metric}
    pairs = zip(targets.T, probabilities.T, strict=True)
    others["ece"] = float(np.mean([expected_calibration_error(*pair) for pair in pairs]))
    for name, (total, count) in predictions.counted.items():
        others.setdefault(name, total / count if count else np.nan)
    known = {name: value for name, value in others.items() if not np.isnan(value)}
    return scores | known


def _macro(targets: np.ndarray, probabilities: np.ndarray, metric: str) -> float:
    """A macro mean over labels; AUROC and AUPRC over those with both classes, NaN without one."""
    if metric == "f1":
        return macro_f1(targets, probabilities)
    score = {"auroc": ranking.auroc, "auprc": ranking.average_precision}[metric]
    return float(ranking.macro(score(targets, probabilities)))


def _joined(parts: list[dict[str, Any]], classes: int) -> Predictions:
    empty = np.zeros((0, classes), np.float32)
    if not parts:
        return Predictions(np.zeros(0, np.int64), empty, empty, empty)
    columns: dict[str, Any] = {n: np.concatenate([part[n] for part in parts]) for n in parts[0]}
    kept = {name: columns.pop(name) for name in list(columns) if name.startswith("features/")}
    return Predictions(
        **columns,
        features={name.split("/", 1)[1]: value for name, value in kept.items()},
    )
