"""Labels from lists of diagnosis codes, as a YAML file names them."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from data.errors import InputError
from data.files import sha256_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from data.switches import AdmissionConfig
    from data.tasks import TaskSpec

SYSTEMS: Final = {"icd9": 9, "icd10": 10}
"""Code system in a label file -> `icd_version` of the diagnoses."""
_FIRST: Final = {"icd9": "a digit, E or V", "icd10": "a letter"}
_BEGINS: Final = {"icd9": re.compile("[0-9EV]"), "icd10": re.compile("[A-Z]")}
_RANGE: Final = re.compile(r"([A-Z]?)(\d+)-([A-Z]?)(\d+)")
_CODE: Final = re.compile(r"[A-Z]?\d[0-9A-Z]*")

Prefixes = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class CodeLists:
    """The labels of one file.

    Attributes:
        labels: In the order of the file, which is the order of the logits.
        prefixes: Per label, (icd_version, prefix): a code that begins so has the label.
        hierarchy: Label -> prefixes whose presence makes that label 0, if the switch asks for it.
        digest: A hash of the three; it names what the labels depend on.
    """

    labels: tuple[str, ...]
    prefixes: tuple[Prefixes, ...]
    hierarchy: Mapping[str, Prefixes]

    @property
    def digest(self) -> str:
        """Equal for equal rules, whatever the file's layout."""
        return sha256_json([self.labels, self.prefixes, sorted(self.hierarchy.items())])

    def of_codes(self, version: int, code: str) -> tuple[int, ...]:
        """The indices of the labels that a code has, before any hierarchy."""
        return tuple(
            index for index, listed in enumerate(self.prefixes) if _matches(listed, version, code)
        )


def labelled_spec(task: TaskSpec, config: AdmissionConfig) -> TaskSpec:
    """The task with the labels of the run's own label file, if it names one.

    Raises:
        InputError: The file is no label file.
    """
    if task.unit != "admission" or config.label_file is None:
        return task
    return replace(task, labels=code_lists(task, config).labels)


def code_lists(task: TaskSpec, config: AdmissionConfig) -> CodeLists:
    """The code lists of a task: the run's own, or the shipped ones.

    Raises:
        InputError: The file is no label file.
    """
    if config.label_file is not None:
        return load_code_lists(config.label_file)
    return shipped(task.code_lists)


@functools.cache
def shipped(name: str) -> CodeLists:
    """Code lists that come with the package: `elixhauser` or `femh`."""
    return load_code_lists(Path(str(resources.files("data"))) / f"resources/labels-{name}.yaml")


def load_code_lists(path: Path) -> CodeLists:
    """Read a label file.

    Raises:
        InputError: Missing, no YAML, or a label, code system or code that is not understood.
    """
    body = _document(path)
    if not isinstance(body, dict) or not isinstance(body.get("labels"), dict) or not body["labels"]:
        raise InputError(f"{path}: no mapping `labels`; give one of label -> code system -> codes")
    unknown = sorted(str(key) for key in body.keys() - {"labels", "hierarchy"})
    if unknown:
        raise InputError(f"{path}: unknown key {unknown[0]!r}; only labels and hierarchy may stand")
    severer = body.get("hierarchy") or {}
    if not isinstance(severer, dict) or body.get("hierarchy") == []:
        raise InputError(f"{path}: hierarchy: give a mapping of label -> code system -> codes")
    labels = {_label(path, name): _prefixes(path, name, c) for name, c in body["labels"].items()}
    hierarchy = {_label(path, name): _prefixes(path, name, c) for name, c in severer.items()}
    for name in hierarchy.keys() - labels.keys():
        raise InputError(f"{path}: hierarchy: {name!r} is no label of the file; correct its name")
    return CodeLists(tuple(labels), tuple(labels.values()), hierarchy)


def _document(path: Path) -> Any:
    import yaml

    class Unique(yaml.SafeLoader):
        """PyYAML keeps the last of two equal keys and says nothing."""

    def mapping(loader: Unique, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                line = node.value[place][0].start_mark.line + 1
                raise InputError(f"{path}: {key!r} stands twice, again on line {line}; rename one")
        return loader.construct_mapping(node, deep=True)

    Unique.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    if not path.is_file():
        raise InputError(f"{path}: no such label file; correct data.extract.admissions.label_file")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Unique)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as YAML ({error}); correct that line") from None


def _label(path: Path, name: object) -> str:
    if not isinstance(name, str):
        raise InputError(f"{path}: label {name!r} is no text; put it in quotes")
    if not name.strip():
        raise InputError(f"{path}: a label without a name; give it one")
    return name


def _prefixes(path: Path, label: object, systems: Any) -> Prefixes:
    if not isinstance(systems, dict) or not systems:
        raise InputError(
            f"{path}: label {label!r}: give {' or '.join(SYSTEMS)} and a list of codes"
        )
    found: list[tuple[int, str]] = []
    for system, codes in systems.items():
        if system not in SYSTEMS:
            raise InputError(
                f"{path}: label {label!r}: unknown code system {system!r}; "
                f"use {' or '.join(SYSTEMS)}"
            )
        if not isinstance(codes, list) or not codes:
            raise InputError(f"{path}: label {label!r}: {system}: give a list of codes")
        for code in codes:
            prefixes = _expanded(path, label, code)
            if not _BEGINS[system].match(prefixes[0]):
                raise InputError(
                    f"{path}: label {label!r}: {code!r} is no code of {system}, whose codes begin "
                    f"with {_FIRST[system]}; put it under its own system"
                )
            found += [(SYSTEMS[system], prefix) for prefix in prefixes]
    return tuple(found)


def _expanded(path: Path, label: object, code: object) -> list[str]:
    """The prefixes of one entry; `I20-I25` and `401-405` are ranges of prefixes."""
    if not isinstance(code, str):
        raise InputError(
            f"{path}: label {label!r}: {code!r} is a number, which loses leading zeros; "
            "put the code in quotes"
        )
    text = code.strip().upper().replace(".", "")
    if span := _RANGE.fullmatch(text):
        letter, first, other, last = span.groups()
        if letter == other and len(first) == len(last) and int(first) <= int(last):
            width = len(first)
            return [f"{letter}{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    elif _CODE.fullmatch(text):
        return [text]
    raise InputError(
        f"{path}: label {label!r}: {code!r} is neither a code like '4280' or 'I50' nor a range "
        "like 'I20-I25'; correct it"
    )


def _matches(prefixes: Prefixes, version: int, code: str) -> bool:
    return any(version == of and code.startswith(prefix) for of, prefix in prefixes)


def admission_labels(
    diagnoses: pl.DataFrame, lists: CodeLists, config: AdmissionConfig
) -> pl.DataFrame:
    """The labels of admissions that have any diagnosis.

    Args:
        diagnoses: subject_id, hadm_id, icd_code, icd_version; dots and blanks are ignored.
        lists: The labels' codes.
        config: `label_scope` and `label_hierarchy`.

    Returns:
        hadm_id (unique, sorted), labels: a list of C float32 of 0 and 1.
    """
    coded = diagnoses.drop_nulls(["hadm_id", "icd_code"]).select(
        "subject_id",
        "hadm_id",
        pl.col("icd_version").cast(pl.Int8),
        pl.col("icd_code")
        .str.strip_chars()
        .str.replace_all(".", "", literal=True)
        .str.to_uppercase(),
    )
    codes = coded.select("icd_version", "icd_code").unique()
    found: list[tuple[int, str, int, bool]] = []
    for version, code in codes.rows():
        found += [(version, code, label, False) for label in lists.of_codes(version, code)]
        if config.label_hierarchy:
            found += [
                (version, code, lists.labels.index(label), True)
                for label, severer in lists.hierarchy.items()
                if _matches(severer, version, code)
            ]
    schema = {"icd_version": pl.Int8, "icd_code": pl.String, "label": pl.Int64, "zero": pl.Boolean}
    mapped = pl.DataFrame(found, schema=schema, orient="row")
    scope = "subject_id" if config.label_scope == "patient_union" else "hadm_id"
    per_scope = (
        coded.join(mapped, on=["icd_version", "icd_code"])
        .group_by(scope, "label")
        .agg(pl.col("zero").any())
        .filter(~pl.col("zero"))
        .group_by(scope)
        .agg("label")
    )
    admissions = coded.select("subject_id", "hadm_id").unique(subset="hadm_id").sort("hadm_id")
    joined = admissions.join(per_scope, on=scope, how="left", maintain_order="left")
    multi_hot = pl.concat_list(
        pl.col("label").list.contains(label).fill_null(value=False).cast(pl.Float32)
        for label in range(len(lists.labels))
    )
    return joined.select("hadm_id", multi_hot.alias("labels"))
