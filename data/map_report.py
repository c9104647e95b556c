"""How far the ICD-10 maps disagree, as text: for `rayfuse data describe` and docs/icd-maps.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.ontology import coverage, disagreement, phenotype_map, tie_decided
from data.tasks import PHENOTYPES

if TYPE_CHECKING:
    from data.ontology import Rule

RULES: tuple[Rule, ...] = ("resolved", "forward_last", "backward_first")


def disagreement_report(rule_a: Rule, rule_b: Rule, *, ties: bool = True) -> str:
    """How two rules label ICD-10 codes, as Markdown: by label, then what the tie rule decides."""
    found = disagreement(rule_a, rule_b)
    rows = [
        [str(row["label"]), row["name"], *(str(row[key]) for key in _COUNTS)]
        for row in found.by_label.iter_rows(named=True)
    ]
    heads = ["", "label", rule_a, rule_b, "both", f"only {rule_a}", f"only {rule_b}"]
    differing = found.codes.height
    parts = [
        f"ICD-10 codes by label under `{rule_a}` and `{rule_b}`; {differing} codes differ.",
        _table(heads, rows),
    ]
    if ties and "resolved" in (rule_a, rule_b):
        parts += [TIES, ties_table()]
    return "\n\n".join(parts) + "\n"


def ties_table() -> str:
    """The codes that step (b) of `resolved` decides, as Markdown."""
    rows = [
        [
            row["icd_code"],
            ", ".join(
                f"{code} (CCS {group})"
                for code, group in zip(row["icd9_codes"], row["ccs_groups"], strict=True)
            ),
            f"{row['label']} {PHENOTYPES[row['label']][0]}",
        ]
        for row in tie_decided().iter_rows(named=True)
    ]
    return _table(["ICD-10", "alternatives", "label given"], rows)


def rules_table() -> str:
    """ICD-10 codes with each label under each rule, and the released rule's reach, as Markdown."""
    by_rule = {rule: _codes_by_label(rule) for rule in RULES}
    rows = [
        [
            str(row["label"]),
            row["name"],
            *(str(by_rule[rule].get(row["label"], 0)) for rule in RULES),
            f"{row['present']} of {row['reachable']}",
        ]
        for row in coverage().iter_rows(named=True)
    ]
    return _table(["", "label", *(f"`{rule}`" for rule in RULES), "released / reachable"], rows)


_COUNTS = ("codes_a", "codes_b", "both", "only_a", "only_b")
TIES = "Codes that the tie rule of `resolved` gives to the one candidate among the 25:"


def _codes_by_label(rule: Rule) -> dict[int, int]:
    table = phenotype_map(rule)
    icd10 = table.filter(table["icd_version"] == 10)
    return dict(icd10["label"].value_counts().rows())


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
