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


ELIXHAUSER_LABELS = (
    "Hypertension, uncomplicated",
    "Cardiac arrhythmias",
    "Fluid and electrolyte disorders",
    "Congestive heart failure",
    "Diabetes w/o chronic complications",
    "Chronic pulmonary disease",
    "Valvular disease",
    "Renal failure",
    "Hypertension, complicated",
    "Other neurological disorders",
)
"""The ten groups of Phan et al. on MIMIC-III, in the paper's order of prevalence."""

FEMH_LABELS = (
    "Hypertension",
    "Diabetes",
    "Heart disease",
    "Cancer",
    "Cerebrovascular disease",
    "Kidney disease",
    "Liver disease",
    "Asthma",
    "Hyperlipidemia",
    "Lung disease",
)
"""The ten groups that Phan et al. name for the Far Eastern Memorial Hospital."""


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One prediction task.

    Attributes:
        name: Its name in configs, shards and results.
        kind: `binary` (one logit) or `multilabel` (one logit a label, each a Bernoulli).
        labels: The labels in the order of the logits.
        unit: A sample is an ICU `stay`, keyed (stay_id, prediction_time), an `image`, or a hospital
            `admission`, keyed (hadm_id, prediction_time).
        window_hours: Hours after intime that features may come from; None is the whole stay.
        min_los_hours: Shorter stays are no samples (mortality after 48 h needs 48 h).
        modalities: What a sample may hold; the first one it must hold.
        label_types: Acute, mixed or chronic for each label, where the paper groups them.
        code_lists: The shipped label file (data/resources/labels-*.yaml) of an admission's task.
        prevalence: Of each label among the train rows at hand; () where there are none.
    """

    name: str
    kind: Literal["binary", "multilabel"]
    labels: tuple[str, ...]
    unit: Literal["stay", "image", "admission"] = "stay"
    window_hours: float | None = None
    min_los_hours: float = 0.0
    modalities: tuple[str, ...] = ("ehr", "cxr")
    label_types: tuple[LabelType, ...] = ()
    code_lists: str = ""
    prevalence: tuple[float, ...] = ()


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
        TaskSpec(
            name="diagnoses",
            kind="multilabel",
            labels=ELIXHAUSER_LABELS,
            unit="admission",
            modalities=("notes", "labs"),
            code_lists="elixhauser",
        ),
        TaskSpec(
            name="diagnoses_femh",
            kind="multilabel",
            labels=FEMH_LABELS,
            unit="admission",
            modalities=("notes", "labs"),
            code_lists="femh",
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
