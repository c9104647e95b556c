"""How far the ICD-10 maps disagree, as text: for `rayfuse data describe` and docs/icd-maps.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.ontology import coverage, disagreement, phenotype_map, tie_decided
from data.tasks import PHENOTYPES

if TYPE_CHECKING:
    import polars as pl

    from data.ontology import Rule

RULES: tuple[Rule, ...] = ("resolved", "forward_last", "backward_first")


def disagreement_report(rule_a: Rule, rule_b: Rule, counts: pl.DataFrame | None = None) -> str:
    """Where two rules label ICD-10 codes differently, as Markdown.

    Args:
        rule_a: The rule in use.
        rule_b: The rule to compare with.
        counts: icd_code and count of a cohort's ICD-10 diagnosis rows; with it, the codes that
            matter there are listed, the most frequent first.

    Returns:
        A table by label, the cohort's differing codes if `counts` is given, and the codes that the
        tie rule of `resolved` decides if it is one of the two.
    """
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
    if counts is not None:
        parts.append(_cohort_codes(found.codes, counts, rule_a, rule_b))
    if "resolved" in (rule_a, rule_b):
        parts += [_TIES, ties_table()]
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
_TIES = "Codes that the tie rule of `resolved` gives to the one candidate among the 25:"


def _codes_by_label(rule: Rule) -> dict[int, int]:
    table = phenotype_map(rule)
    icd10 = table.filter(table["icd_version"] == 10)
    return dict(icd10["label"].value_counts().rows())


def _cohort_codes(codes: pl.DataFrame, counts: pl.DataFrame, rule_a: Rule, rule_b: Rule) -> str:
    met = codes.join(counts, on="icd_code", how="inner").sort(
        ["count", "icd_code"], descending=[True, False]
    )
    rows = [
        [row["icd_code"], str(row["count"]), _labels(row["labels_a"]), _labels(row["labels_b"])]
        for row in met.head(30).iter_rows(named=True)
    ]
    head = f"Of them {met.height} occur in this cohort, in {met['count'].sum()} diagnosis rows"
    return f"{head} (the first 30):\n\n{_table(['ICD-10', 'rows', rule_a, rule_b], rows)}"


def _labels(labels: list[int]) -> str:
    return ", ".join(map(str, labels)) or "none"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
