"""Notes and labs of a batch's rows, added to what every task has."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from data.lab_scaler import LabScaler
    from data.reader import ShardReader
    from data.schema import Batch


def with_clinical(batch: Batch, reader: ShardReader, scaler: LabScaler | None) -> Batch:
    """The batch with the notes, abnormal results and lab matrix of its rows.

    A row whose results are all of other items or units has no labs.

    Args:
        batch: Of `data.collate.to_batch`.
        reader: The shards its rows are of.
        scaler: The columns of the matrix; None gives no matrix.
    """
    import torch

    texts = reader.notes(batch.rows)
    index = np.flatnonzero([text is not None for text in texts]).astype(np.int64)
    has_note = np.zeros(len(batch), bool)
    has_note[index] = True
    values = np.zeros((len(batch), 0), np.float32)
    observed = values.astype(bool)
    if scaler is not None:
        values, observed = scaler.apply(reader.lab_values(batch.rows))
    has_labs = observed.any(axis=1)
    present = {
        "notes": torch.from_numpy(has_note),
        "labs": torch.from_numpy(has_labs),
    }
    return replace(
        batch,
        notes=tuple(text for text in texts if text is not None),
        notes_index=torch.from_numpy(index),
        lab_texts=tuple(text or "" for text in reader.lab_texts(batch.rows)),
        labs=torch.from_numpy(values),
        labs_observed=torch.from_numpy(observed),
        present={**batch.present, **present},
    )
