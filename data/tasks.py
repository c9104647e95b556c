"""What is predicted: sample key, window, labels, and when each becomes known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data.errors import InputError

LabelType = Literal["acute", "mixed", "chronic"]

PHENOTYPES: tuple[tuple[str, LabelType], ...] = (
    ("Acute and unspecified renal failure", "acute"),
    ("Acute cerebrovascular disease", "acute"),
    ("Acute myocardial infarction", "acute"),
    ("Cardiac dysrhythmias", "mixed"),
    ("Chronic kidney disease", "chronic"),
    ("Chronic obstructive pulmonary disease and bronchiectasis", "chronic"),
    ("Complications of surgical procedures or medical care", "acute"),
    ("Conduction disorders", "mixed"),
    ("Congestive heart failure; nonhypertensive", "mixed"),
    ("Coronary atherosclerosis and other heart disease", "chronic"),
    ("Diabetes mellitus with complications", "mixed"),
    ("Diabetes mellitus without complication", "chronic"),
    ("Disorders of lipid metabolism", "chronic"),
    ("Essential hypertension", "chronic"),
    ("Fluid and electrolyte disorders", "acute"),
    ("Gastrointestinal hemorrhage", "acute"),
    ("Hypertension with complications and secondary hypertension", "chronic"),
    ("Other liver diseases", "mixed"),
    ("Other lower respiratory disease", "acute"),
    ("Other upper respiratory disease", "acute"),
    ("Pleurisy; pneumothorax; pulmonary collapse", "acute"),
    ("Pneumonia (except that caused by tuberculosis or sexually transmitted disease)", "acute"),
    ("Respiratory failure; insufficiency; arrest (adult)", "acute"),
    ("Septicemia (except in labor)", "acute"),
    ("Shock", "acute"),
)
"""The 25 CCS groups in the order of the benchmark, with the MedFuse paper's types (13/5/7)."""

CHEXPERT_LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One prediction task.

    Attributes:
        name: Its name in configs, shards and results.
        kind: `binary` (one logit) or `multilabel` (one logit a label, each a Bernoulli).
        labels: The labels in the order of the logits.
        unit: A sample is an ICU `stay`, keyed (stay_id, prediction_time), or an `image`.
        window_hours: Hours after intime that features may come from; None is the whole stay.
        min_los_hours: Shorter stays are no samples (mortality after 48 h needs 48 h).
        modalities: What a sample may hold; the first one it must hold.
        label_types: Acute, mixed or chronic for each label, where the paper groups them.
    """

    name: str
    kind: Literal["binary", "multilabel"]
    labels: tuple[str, ...]
    unit: Literal["stay", "image"] = "stay"
    window_hours: float | None = None
    min_los_hours: float = 0.0
    modalities: tuple[str, ...] = ("ehr", "cxr")
    label_types: tuple[LabelType, ...] = ()


_PHENOTYPE_LABELS = tuple(name for name, _ in PHENOTYPES)
_PHENOTYPE_TYPES = tuple(kind for _, kind in PHENOTYPES)

TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec(
            name="mortality",
            kind="binary",
            labels=("In-hospital mortality",),
            window_hours=48.0,
            min_los_hours=48.0,
        ),
        TaskSpec(
            name="phenotyping",
            kind="multilabel",
            labels=_PHENOTYPE_LABELS,
            label_types=_PHENOTYPE_TYPES,
        ),
        TaskSpec(
            name="phenotyping_48h",
            kind="multilabel",
            labels=_PHENOTYPE_LABELS,
            label_types=_PHENOTYPE_TYPES,
            window_hours=48.0,
        ),
        TaskSpec(
            name="radiology",
            kind="multilabel",
            labels=CHEXPERT_LABELS,
            unit="image",
            modalities=("cxr",),
        ),
    )
}


def task_spec(name: str) -> TaskSpec:
    """The task of that name.

    Raises:
        InputError: No task has it; the message lists those that exist.
    """
    try:
        return TASKS[name]
    except KeyError:
        raise InputError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}") from None
