"""Folds of patients: which rows of the train split a run leaves out."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


def fold_of(subject_id: int, folds: int) -> int:
    """A patient's fold, from 0: a hash of the id, the same in every cohort, task and seed.

    It is independent of the hash that assigns splits (`data.splits.subject_position`).
    """
    word = hashlib.blake2b(f"fold of {subject_id}".encode(), digest_size=8).digest()
    return int.from_bytes(word, "big") % folds


def folds_of(subject_ids: Iterable[int], folds: int) -> NDArray[np.int64]:
    """[N] the fold of each of N patients."""
    return np.array([fold_of(subject, folds) for subject in subject_ids], np.int64)
