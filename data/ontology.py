"""From diagnosis codes to the 25 phenotype labels, derived from the public GEM and CCS tables.

ICD-9-CM codes belong to one AHRQ CCS single-level group each (2015). ICD-10-CM codes reach ICD-9
through the CMS General Equivalence Mappings of fiscal year 2018 by one of three rules:

- `resolved` (default): reads the GEM's flags. Rows flagged as a combination belong together, so a
  code has the groups of all of them. Plain rows are alternatives, so a code has the group of one
  of them: where they disagree, (a) the majority over the backward targets and the ICD-9 codes
  whose forward mapping reaches the code, counted together; (b) on a tie, if exactly one candidate
  is among the 25, that one; (c) else the group of the smallest tied ICD-9 code. Codes that the GEMs
  do not know take the labels of a known neighbour (`resolved_labels`).
- `forward_last`: what the released code of MedFuse and DrFuse ships, which keeps only the last
  target of each ICD-9 code's forward mapping; a later ICD-9 code overwrites an earlier one.
- `backward_first`: the naive reading of the papers, the first target of the backward mapping.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Literal, NamedTuple

import polars as pl

from data.tasks import PHENOTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Rule = Literal["resolved", "forward_last", "backward_first"]

CCS_GROUPS = (
    157,
    109,
    100,
    106,
    158,
    127,
    238,
    105,
    108,
    101,
    50,
    49,
    53,
    98,
    55,
    153,
    99,
    151,
    133,
    134,
    130,
    122,
    131,
    2,
    249,
)
"""AHRQ's number of each of the 25 groups, in the order of PHENOTYPES."""
LABEL_OF_GROUP = {group: label for label, group in enumerate(CCS_GROUPS)}

MAP_SCHEMA = {"icd_version": pl.Int8, "icd_code": pl.String, "label": pl.Int8}
_NO_TARGET = "NoDx"
_SHORTEST_CODE = 3


class GemRow(NamedTuple):
    """One target of a code; flags are approximate, no map, combination, scenario, choice list."""

    target: str
    flags: str

    @property
    def combination(self) -> bool:
        """Whether the row is one part of several that belong together."""
        return self.flags[2] == "1"


class Resolution(NamedTuple):
    """How the plain targets of one code that lie in several CCS groups became one group."""

    group: int
    step: Literal["majority", "benchmark", "smallest"]
    candidates: tuple[tuple[str, int], ...]
    """The backward targets with their groups."""


@functools.cache
def icd9_groups() -> Mapping[str, int]:
    """The CCS group of each ICD-9-CM code (AHRQ single-level CCS, 2015)."""
    return {code: int(group) for code, group in _resource("ccs_2015_icd9.csv.gz", "icd9", "ccs")}


@functools.cache
def backward_gem() -> Mapping[str, tuple[GemRow, ...]]:
    """ICD-10-CM code to its ICD-9-CM targets, in the order of the GEM; empty where it has none."""
    return _gem("gem_2018_icd10_to_icd9.csv.gz", "icd10", "icd9")


@functools.cache
def forward_gem() -> Mapping[str, tuple[GemRow, ...]]:
    """ICD-9-CM code to its ICD-10-CM targets, in the order of the GEM; empty where it has none."""
    return _gem("gem_2018_icd9_to_icd10.csv.gz", "icd9", "icd10")


@functools.cache
def _inverse_forward() -> Mapping[str, tuple[str, ...]]:
    inverse: defaultdict[str, list[str]] = defaultdict(list)
    for icd9, rows in forward_gem().items():
        for target in dict.fromkeys(row.target for row in rows):
            inverse[target].append(icd9)
    return {icd10: tuple(sorted(sources)) for icd10, sources in inverse.items()}


@functools.cache
def straddling() -> Mapping[str, Resolution]:
    """The ICD-10 codes whose plain targets lie in several CCS groups, and how each was resolved."""
    resolved = {}
    for code, rows in backward_gem().items():
        plain = tuple(row.target for row in rows if not row.combination)
        if len({icd9_groups()[target] for target in plain}) > 1:
            resolved[code] = _resolve(plain, _inverse_forward().get(code, ()))
    return resolved


def _resolve(plain: tuple[str, ...], reached_from: tuple[str, ...]) -> Resolution:
    groups = icd9_groups()
    candidates = tuple((target, groups[target]) for target in plain)
    votes = [code for code in (*plain, *reached_from) if code in groups]
    counts = Counter(groups[code] for code in votes)
    most = max(counts.values())
    tied = {group for group, count in counts.items() if count == most}
    if len(tied) == 1:
        return Resolution(tied.pop(), "majority", candidates)
    labelled = tied & LABEL_OF_GROUP.keys()
    if len(labelled) == 1:
        return Resolution(labelled.pop(), "benchmark", candidates)
    smallest = min(code for code in votes if groups[code] in tied)
    return Resolution(groups[smallest], "smallest", candidates)


def _resolved_groups(code: str, rows: tuple[GemRow, ...]) -> set[int]:
    together = {icd9_groups()[row.target] for row in rows if row.combination}
    if code in straddling():
        return together | {straddling()[code].group}
    return together | {icd9_groups()[row.target] for row in rows if not row.combination}


def _labels(groups: Iterable[int]) -> list[int]:
    return sorted(LABEL_OF_GROUP[group] for group in groups if group in LABEL_OF_GROUP)


def _icd10_labels(rule: Rule) -> dict[str, list[int]]:
    if rule == "resolved":
        return {
            code: _labels(_resolved_groups(code, rows)) for code, rows in backward_gem().items()
        }
    if rule == "backward_first":
        return {
            code: _labels({icd9_groups()[rows[0].target]})
            for code, rows in backward_gem().items()
            if rows
        }
    last: dict[str, list[int]] = {}
    for icd9, rows in forward_gem().items():
        label = _labels({icd9_groups()[icd9]}) if icd9 in icd9_groups() else []
        if rows and label:
            last[rows[-1].target] = label
    return last


@functools.cache
def phenotype_map(rule: Rule) -> pl.DataFrame:
    """Every code that has a label under a rule.

    Returns:
        Columns icd_version (9 or 10), icd_code (no dot) and label (0-24), sorted; a code of two
        labels (R65.21: septicemia and shock) has two rows.
    """
    icd9 = {code: _labels({group}) for code, group in icd9_groups().items()}
    rows = [
        (version, code, label)
        for version, labels_of in ((9, icd9), (10, _icd10_labels(rule)))
        for code, labels in labels_of.items()
        for label in labels
    ]
    table = pl.DataFrame(rows, schema=MAP_SCHEMA, orient="row")
    return table.sort("icd_version", "icd_code", "label")


def resolved_labels(icd10_code: str) -> frozenset[int]:
    """The labels of any ICD-10 code under `resolved`, also of one that the GEMs do not know.

    A code younger than the GEMs (I48.20 of 2020) takes the labels of its longest known prefix. One
    that they have dropped because it was divided (E78.0, into E78.00 and E78.01 in 2017) takes the
    labels that all its divisions share. Any other has none.
    """
    labels_of = _label_sets("resolved")
    if icd10_code in backward_gem():
        return labels_of.get(icd10_code, frozenset())
    divisions = _divisions(icd10_code)
    if divisions:
        return frozenset.intersection(*(labels_of.get(code, frozenset()) for code in divisions))
    for length in range(len(icd10_code) - 1, _SHORTEST_CODE - 1, -1):
        if icd10_code[:length] in backward_gem():
            return labels_of.get(icd10_code[:length], frozenset())
    return frozenset()


@functools.cache
def _sorted_icd10() -> tuple[str, ...]:
    return tuple(sorted(backward_gem()))


def _divisions(icd10_code: str) -> tuple[str, ...]:
    if len(icd10_code) < _SHORTEST_CODE:
        return ()
    codes = _sorted_icd10()
    start = bisect.bisect_left(codes, icd10_code)
    return tuple(itertools.takewhile(lambda code: code.startswith(icd10_code), codes[start:]))


@dataclass(frozen=True)
class Disagreement:
    """Where two rules label ICD-10 codes differently.

    Attributes:
        by_label: label, name, codes_a, codes_b, both, only_a, only_b: counts of ICD-10 codes.
        codes: icd_code, labels_a, labels_b of each code whose labels differ, sorted by code.
        ties: icd_code, icd9_codes, ccs_groups, label of each code that step (b) of `resolved`
            decides, which leans to positives.
    """

    by_label: pl.DataFrame
    codes: pl.DataFrame
    ties: pl.DataFrame


def disagreement(rule_a: Rule, rule_b: Rule) -> Disagreement:
    """Compare two rules over the ICD-10 codes of the GEMs."""
    labels_a, labels_b = _label_sets(rule_a), _label_sets(rule_b)
    by_label = []
    for label, (name, _) in enumerate(PHENOTYPES):
        codes_a = {code for code, labels in labels_a.items() if label in labels}
        codes_b = {code for code, labels in labels_b.items() if label in labels}
        both = len(codes_a & codes_b)
        by_label.append(
            (
                label,
                name,
                len(codes_a),
                len(codes_b),
                both,
                len(codes_a) - both,
                len(codes_b) - both,
            )
        )
    differing = [
        (code, sorted(labels_a.get(code, ())), sorted(labels_b.get(code, ())))
        for code in sorted(labels_a.keys() | labels_b.keys())
        if labels_a.get(code) != labels_b.get(code)
    ]
    columns = ["label", "name", "codes_a", "codes_b", "both", "only_a", "only_b"]
    return Disagreement(
        by_label=pl.DataFrame(by_label, schema=columns, orient="row"),
        codes=pl.DataFrame(
            differing,
            schema={
                "icd_code": pl.String,
                "labels_a": pl.List(pl.Int8),
                "labels_b": pl.List(pl.Int8),
            },
            orient="row",
        ),
        ties=tie_decided(),
    )


def tie_decided() -> pl.DataFrame:
    """The ICD-10 codes that step (b) of `resolved` gives a label: a tie, one of them among the 25.

    Returns:
        Columns icd_code, icd9_codes, ccs_groups (lists, the alternatives) and label.
    """
    rows = [
        (
            code,
            [icd9 for icd9, _ in resolution.candidates],
            [group for _, group in resolution.candidates],
            LABEL_OF_GROUP[resolution.group],
        )
        for code, resolution in sorted(straddling().items())
        if resolution.step == "benchmark"
    ]
    schema: dict[str, pl.DataType | type[pl.DataType]] = {
        "icd_code": pl.String,
        "icd9_codes": pl.List(pl.String),
        "ccs_groups": pl.List(pl.Int16),
        "label": pl.Int8,
    }
    return pl.DataFrame(rows, schema=schema, orient="row")


def coverage() -> pl.DataFrame:
    """How much of each group the released rule reaches.

    Returns:
        label, name, reachable (ICD-10 codes with any backward target in the group) and present
        (those of them to which `forward_last` gives that label).
    """
    released = _label_sets("forward_last")
    rows = []
    for label, group in enumerate(CCS_GROUPS):
        reachable = {
            code
            for code, targets in backward_gem().items()
            if any(icd9_groups()[row.target] == group for row in targets)
        }
        present = sum(label in released.get(code, ()) for code in reachable)
        rows.append((label, PHENOTYPES[label][0], len(reachable), present))
    return pl.DataFrame(rows, schema=["label", "name", "reachable", "present"], orient="row")


@functools.cache
def _label_sets(rule: Rule) -> Mapping[str, frozenset[int]]:
    return {code: frozenset(labels) for code, labels in _icd10_labels(rule).items() if labels}


def _gem(name: str, source: str, target: str) -> dict[str, tuple[GemRow, ...]]:
    rows: dict[str, list[GemRow]] = {}
    for code, reached, flags in _resource(name, source, target, "flags"):
        targets = rows.setdefault(code, [])
        if reached != _NO_TARGET:
            targets.append(GemRow(reached.upper(), flags))
    return {code: tuple(targets) for code, targets in rows.items()}


def _resource(name: str, *columns: str) -> list[tuple[str, ...]]:
    packed = resources.files("data").joinpath("resources", name).read_bytes()
    return pl.read_csv(packed, infer_schema=False).select(columns).rows()
