"""Patient-wise splits: a hash of subject_id, or the lists a user gives."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import polars as pl

from data.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from data.switches import Split

TRAIN, VAL, TEST = SPLITS = ("train", "val", "test")


def subject_position(subject_id: int, seed: int) -> float:
    """A subject's place in [0, 1): blake2b of the seed and the id, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}:{subject_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def assign_split(subject_ids: pl.Series, split: Split) -> pl.Series:
    """The split of each subject.

    Without lists, a subject's hash decides, so that a subject keeps its split in every cohort,
    task and release whose ids agree. With lists, whoever is in neither list is train.

    Args:
        subject_ids: Integer ids, repeats allowed, none null.
        split: Seed and fractions, or the paths of both lists.

    Returns:
        A String series `split` of `train`, `val`, `test`, in the order of `subject_ids`.

    Raises:
        InputError: A list is missing, empty, unreadable, or names a subject of the other list.
    """
    unique = subject_ids.unique()
    if split.val_subjects is not None and split.test_subjects is not None:
        listed = _listed_splits(split.val_subjects, split.test_subjects)
        assigned = [listed.get(subject, TRAIN) for subject in unique.to_list()]
    else:
        assigned = [_hashed_split(subject, split) for subject in unique.to_list()]
    if not assigned:
        return pl.Series("split", [], dtype=pl.String)
    return subject_ids.replace_strict(
        unique, pl.Series(assigned, dtype=pl.String), return_dtype=pl.String
    ).alias("split")


def _hashed_split(subject_id: int, split: Split) -> str:
    position = subject_position(subject_id, split.seed)
    train, val, _ = split.fractions
    if position < train:
        return TRAIN
    return VAL if position < train + val else TEST


def _listed_splits(val_path: Path, test_path: Path) -> dict[int, str]:
    val, test = read_subject_list(val_path), read_subject_list(test_path)
    both = sorted(val & test)
    if both:
        raise InputError(
            f"{val_path} and {test_path}: {len(both)} subjects are in both lists "
            f"(subject_id {', '.join(map(str, both[:5]))}); a subject belongs to one split"
        )
    return dict.fromkeys(val, VAL) | dict.fromkeys(test, TEST)


def read_subject_list(path: Path) -> set[int]:
    """The integer ids of a CSV's `subject_id` column (other columns are ignored).

    The ids are cast to integers: a list of strings compared with an integer column matches
    nobody and would leave the split empty.

    Raises:
        InputError: The file, the column or any id is missing, or an id is no integer.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a CSV with a subject_id column")
    try:
        table = pl.read_csv(path, infer_schema=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"{path}: not readable as CSV ({error}); give a CSV of subjects") from None
    columns = {name.strip().lower(): name for name in table.columns}
    if "subject_id" not in columns:
        raise InputError(
            f"{path}: no column subject_id (found: {', '.join(table.columns)}); "
            "name the column of ids subject_id"
        )
    text = table[columns["subject_id"]].str.strip_chars()
    ids = text.cast(pl.Int64, strict=False)
    if ids.null_count():
        row = ids.is_null().arg_max() or 0
        raise InputError(
            f"{path}: row {row + 2}: subject_id {text[row]!r} is no integer; correct that row"
        )
    if ids.is_empty():
        raise InputError(f"{path}: lists no subject; a split would be empty, so add its subjects")
    return set(ids.to_list())
