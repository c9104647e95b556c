"""A sound folder has no problem; each kind of damage is found."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from data.check import check, missing_classes
from data.errors import InputError
from data.files import sha256_file, sha256_json
from data.shards import refuse_unlearnable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from data.manifest import Manifest

Rows = list[dict[str, Any]]


@pytest.fixture
def make_sound(make_shards: Callable[..., Manifest]) -> Callable[..., Manifest]:
    """The shared fixture's folder with the hash that its config has."""

    def make(folder: Path, **options: Any) -> Manifest:
        manifest = make_shards(folder, image_size=32, **options)
        hashed = {"config_hash": sha256_json(manifest.config)}
        manifest.model_copy(update=hashed).write(folder)
        return manifest

    return make


def test_a_sound_folder_has_no_problem(tmp_path: Path, make_sound: Callable[..., Manifest]) -> None:
    make_sound(tmp_path, rows=20)
    assert check(tmp_path) == []


def _look_ahead(rows: Rows) -> None:
    rows[3]["ehr_available_at"] = rows[3]["prediction_time"] + timedelta(seconds=1)


def _late_image(rows: Rows) -> None:
    row = next(row for row in rows if row["cxr"] is not None)
    row["cxr_available_at"] = row["prediction_time"] + timedelta(seconds=1)


def _two_splits(rows: Rows) -> None:
    rows[1]["split"] = "test" if rows[0]["split"] != "test" else "train"


def _label_of_two(rows: Rows) -> None:
    rows[2]["labels"] = [2.0]


def _same_key(rows: Rows) -> None:
    for column in ("stay_id", "prediction_time"):
        rows[1][column] = rows[0][column]


def _two_shards(rows: Rows) -> None:
    rows[-1]["subject_id"] = rows[0]["subject_id"]
    rows[-1]["split"] = rows[0]["split"]


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (_look_ahead, "ehr_available_at: later than prediction_time"),
        (_late_image, "cxr_available_at: later than prediction_time"),
        (_two_splits, "in two splits"),
        (_label_of_two, "neither 0 nor 1"),
        (_same_key, "repeated sample key"),
        (_two_shards, "in two shards"),
    ],
)
def test_each_broken_rule_is_found(
    tmp_path: Path,
    make_sound: Callable[..., Manifest],
    edit: Callable[[Rows], None],
    problem: str,
) -> None:
    make_sound(tmp_path, rows=20, edit=edit)
    problems = check(tmp_path)
    assert any(problem in line for line in problems), problems
    assert all("part-0000" in line for line in problems)


def test_an_altered_a_missing_and_an_unlisted_shard(
    tmp_path: Path, make_sound: Callable[..., Manifest]
) -> None:
    manifest = make_sound(tmp_path, rows=24, shards=3)
    first, second, third = (tmp_path / file.name for file in manifest.files)
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(bytes(content))
    second.rename(second.with_name("part-00009.parquet"))
    assert check(tmp_path) == [
        f"{second.with_name('part-00009.parquet')}: not in the manifest; remove it",
        f"{first}: altered since its manifest was written; extract again",
        f"{second}: missing; extract again",
    ]
    assert third.is_file()


def test_a_manifest_that_does_not_fit_its_shards(
    tmp_path: Path, make_sound: Callable[..., Manifest]
) -> None:
    manifest = make_sound(tmp_path, rows=20)
    path = tmp_path / manifest.files[0].name
    path.write_bytes(b"PAR1 no more")
    edited = json.loads((tmp_path / "manifest.json").read_text())
    edited["files"][0]["sha256"] = sha256_file(path)
    (tmp_path / "manifest.json").write_text(json.dumps(edited))
    assert any("not readable as Parquet" in line for line in check(tmp_path))


def test_no_manifest_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished extraction"):
        check(tmp_path)


def test_missing_classes_are_named(tmp_path: Path, make_sound: Callable[..., Manifest]) -> None:
    def all_survive(rows: Rows) -> None:
        for row in rows:
            if row["split"] == "val":
                row["labels"] = [0.0]

    manifest = make_sound(tmp_path, rows=40, edit=all_survive)
    assert missing_classes(manifest) == ["split val has no positive row of 'In-hospital mortality'"]
    empty = manifest.model_copy(update={"splits": {**manifest.splits, "test": 0}})
    assert "split test has no rows" in missing_classes(empty)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_nothing_can_be_learnt_or_chosen_from_one_class(
    tmp_path: Path, make_sound: Callable[..., Manifest], split: str, label: float
) -> None:
    def one_class(rows: Rows) -> None:
        for row in rows:
            if row["split"] == split:
                row["labels"] = [label] * len(row["labels"])

    with pytest.raises(InputError, match=f"split {split}: every label has one class only"):
        refuse_unlearnable(make_sound(tmp_path / "a", rows=40, edit=one_class))
    sound = make_sound(tmp_path / "b", rows=40)
    refuse_unlearnable(sound)
    missing = {name: part for name, part in sound.prevalence.items() if name != split}
    with pytest.raises(InputError, match=f"split {split}: there is no row"):
        refuse_unlearnable(sound.model_copy(update={"prevalence": missing}))


def test_one_usable_label_is_enough(tmp_path: Path, make_sound: Callable[..., Manifest]) -> None:
    def second_only(rows: Rows) -> None:
        for row in rows:
            row["labels"] = [0.0, row["labels"][1], *[1.0] * (len(row["labels"]) - 2)]

    manifest = make_sound(tmp_path, rows=80, task="phenotyping_48h", edit=second_only)
    refuse_unlearnable(manifest)
    assert len(missing_classes(manifest)) >= 2 * 24
