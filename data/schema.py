"""Modalities, channels, shard columns and the batch: the words every package shares.

Dimension letters: B rows, T steps, V variables, F features, P rows with an image, C classes.
Masks are True = valid, everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import torch

SCHEMA_VERSION = 2
"""1: series and images; 2: notes and labs beside them."""

MODALITIES = ("ehr", "cxr", "notes", "labs", "codes")


@dataclass(frozen=True)
class Channel:
    """One of the 17 variables: its levels if categorical, and the value imputed before the first.

    `normal` is a level's text for a categorical channel, a number's text otherwise
    (the discretiser of the MIMIC-III benchmark).
    """

    name: str
    normal: str
    levels: tuple[str, ...] = ()


CHANNELS: tuple[Channel, ...] = (
    Channel("Capillary refill rate", "0.0", ("0.0", "1.0")),
    Channel("Diastolic blood pressure", "59.0"),
    Channel("Fraction inspired oxygen", "0.21"),
    Channel(
        "Glascow coma scale eye opening",
        "4 Spontaneously",
        (
            "To Pain",
            "3 To speech",
            "1 No Response",
            "4 Spontaneously",
            "None",
            "To Speech",
            "Spontaneously",
            "2 To pain",
        ),
    ),
    Channel(
        "Glascow coma scale motor response",
        "6 Obeys Commands",
        (
            "1 No Response",
            "3 Abnorm flexion",
            "Abnormal extension",
            "No response",
            "4 Flex-withdraws",
            "Localizes Pain",
            "Flex-withdraws",
            "Obeys Commands",
            "Abnormal Flexion",
            "6 Obeys Commands",
            "5 Localizes Pain",
            "2 Abnorm extensn",
        ),
    ),
    Channel(
        "Glascow coma scale total",
        "15",
        ("11", "10", "13", "12", "15", "14", "3", "5", "4", "7", "6", "9", "8"),
    ),
    Channel(
        "Glascow coma scale verbal response",
        "5 Oriented",
        (
            "1 No Response",
            "No Response",
            "Confused",
            "Inappropriate Words",
            "Oriented",
            "No Response-ETT",
            "5 Oriented",
            "Incomprehensible sounds",
            "1.0 ET/Trach",
            "4 Confused",
            "2 Incomp sounds",
            "3 Inapprop words",
        ),
    ),
    Channel("Glucose", "128.0"),
    Channel("Heart Rate", "86"),
    Channel("Height", "170.0"),
    Channel("Mean blood pressure", "77.0"),
    Channel("Oxygen saturation", "98.0"),
    Channel("Respiratory rate", "19"),
    Channel("Systolic blood pressure", "118.0"),
    Channel("Temperature", "36.6"),
    Channel("Weight", "81.0"),
    Channel("pH", "7.4"),
)
N_CHANNELS = len(CHANNELS)


def _feature_names() -> tuple[str, ...]:
    names: list[str] = []
    for channel in CHANNELS:
        if channel.levels:
            names += [f"{channel.name}->{level}" for level in channel.levels]
        else:
            names.append(channel.name)
    return (*names, *(f"mask->{channel.name}" for channel in CHANNELS))


FEATURE_NAMES = _feature_names()
N_FEATURES = len(FEATURE_NAMES)
CONTINUOUS = tuple(v for v, channel in enumerate(CHANNELS) if not channel.levels)
"""Indices (into CHANNELS) of the 12 channels that a normaliser touches."""

_TIME = pa.timestamp("us")

SHARD_SCHEMA = pa.schema(
    [
        pa.field("subject_id", pa.int64(), nullable=False),
        pa.field("hadm_id", pa.int64()),
        pa.field("stay_id", pa.int64()),
        pa.field("prediction_time", _TIME),
        pa.field("split", pa.string(), nullable=False),
        pa.field("sex", pa.string()),
        pa.field("age", pa.float32()),
        # T x 17, row by row: imputed values before normalisation; a categorical channel holds
        # its level's index. T = len / 17.
        pa.field("ehr", pa.list_(pa.float32())),
        # T x 17: 1 where the bin was observed, 0 where it was imputed.
        pa.field("ehr_observed", pa.list_(pa.uint8())),
        pa.field("ehr_available_at", _TIME),
        # Grey JPEG, short side 256.
        pa.field("cxr", pa.binary()),
        pa.field("dicom_id", pa.string()),
        pa.field("cxr_available_at", _TIME),
        pa.field("cxr_labels", pa.list_(pa.float32())),
        # The kept sections of the note, headers included; never in a message.
        pa.field("notes", pa.large_string()),
        pa.field("notes_available_at", _TIME),
        # Results by item, as numbers before any scaling; a run chooses its items (data.lab_scaler).
        pa.field("lab_items", pa.list_(pa.string())),
        pa.field("labs", pa.list_(pa.float32())),
        pa.field("lab_units", pa.list_(pa.string())),
        # The abnormal ones as a sentence; null where none is.
        pa.field("lab_text", pa.large_string()),
        pa.field("labs_available_at", _TIME),
        pa.field("labels", pa.list_(pa.float32()), nullable=False),
    ]
)
"""One row is one sample, in shards/part-*.parquet; a null modality is absent.

A stay's key is (stay_id, prediction_time), an admission's (hadm_id, prediction_time), with stay_id
and `ehr` null. For the image unit the key is dicom_id, `ehr` is null and stay_id may be null.
`*_available_at` is the latest time at which anything used of that
modality was known; the reader refuses a row where it is later than prediction_time.
"""


def _no_index() -> torch.Tensor:
    import torch

    return torch.empty(0, dtype=torch.int64)


def _no_labs() -> torch.Tensor:
    import torch

    return torch.empty(0, 0)


def _no_labs_observed() -> torch.Tensor:
    import torch

    return torch.empty(0, 0, dtype=torch.bool)


def _no_draws() -> np.ndarray:
    import numpy as np

    return np.empty(0, np.uint64)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of one step on one device.

    Attributes:
        ehr: [B, T, 76] float32, zero beyond each row's length. T >= 1.
        lengths: [B] int64, >= 1 (1 for a row without time series, whose values are zero).
        cxr: [P, 3, S, S] float32, only the rows that have an image, in the rows' order; or, where a
            frozen encoder's outputs are kept, those [P, ...].
        cxr_index: [P] int64, the row of each image.
        present: For each modality [B] bool, True = present.
        targets: [B, C] float32.
        cxr_targets: [P, 14] float32, CheXpert labels of the images (zeros where unlabelled).
        rows: [B] int64, the row's index in its manifest: the key of predictions and audits.
        notes: N texts, only of the rows that have one, in the rows' order; a tokenizer comes later.
        notes_index: [N] int64, the row of each note.
        lab_texts: B sentences of abnormal results, empty where there is none; () without labs.
        labs: [B, K] float32, scaled, zero where unobserved; [B, 0] or [0, 0] without labs.
        labs_observed: [B, K] bool, True = observed.
        draws: [B] uint64, a random word of each row, for models that draw: it depends on (seed,
            epoch, row) alone, and a split that is evaluated is always in epoch 0.
    """

    ehr: torch.Tensor
    lengths: torch.Tensor
    cxr: torch.Tensor
    cxr_index: torch.Tensor
    present: dict[str, torch.Tensor]
    targets: torch.Tensor
    cxr_targets: torch.Tensor
    rows: np.ndarray = field(repr=False)
    notes: tuple[str, ...] = field(default=(), repr=False)
    notes_index: torch.Tensor = field(default_factory=_no_index)
    lab_texts: tuple[str, ...] = field(default=(), repr=False)
    labs: torch.Tensor = field(default_factory=_no_labs)
    labs_observed: torch.Tensor = field(default_factory=_no_labs_observed)
    draws: np.ndarray = field(default_factory=_no_draws, repr=False)

    def __len__(self) -> int:
        """The number of rows B."""
        return int(self.targets.shape[0])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            ehr=move(self.ehr),
            lengths=move(self.lengths),
            cxr=move(self.cxr),
            cxr_index=move(self.cxr_index),
            present={name: move(mask) for name, mask in self.present.items()},
            targets=move(self.targets),
            cxr_targets=move(self.cxr_targets),
            notes_index=move(self.notes_index),
            labs=move(self.labs),
            labs_observed=move(self.labs_observed),
        )

    def without(self, modality: str, rows: torch.Tensor) -> Batch:
        """The same rows with one modality withheld where `rows` ([B] bool) is True."""
        present = self.present[modality] & ~rows
        fewer = replace(self, present={**self.present, modality: present})
        if modality == "notes":
            kept = present[self.notes_index]
            texts = zip(self.notes, kept.tolist(), strict=True)
            return replace(
                fewer,
                notes=tuple(text for text, stays in texts if stays),
                notes_index=self.notes_index[kept],
            )
        if modality == "labs" and len(self.labs):
            sentences = zip(self.lab_texts, present.tolist(), strict=True)
            return replace(
                fewer,
                labs=self.labs * present[:, None],
                labs_observed=self.labs_observed & present[:, None],
                lab_texts=tuple(text if stays else "" for text, stays in sentences),
            )
        if modality != "cxr":
            return fewer
        kept = present[self.cxr_index]
        return replace(
            fewer,
            cxr=self.cxr[kept],
            cxr_index=self.cxr_index[kept],
            cxr_targets=self.cxr_targets[kept],
        )


class BatchStream(Protocol):
    """What the training loop asks of its data: this rank's share of each global batch, in order."""

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch, the short last one counted."""
        ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch | None]:
        """This rank's batches from `start_step` on; None where its share of a step is empty."""
        ...
