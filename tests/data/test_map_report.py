from __future__ import annotations

from pathlib import Path

import polars as pl

from data.map_report import disagreement_report, rules_table, ties_table


def test_the_page_shows_what_the_code_does():
    page = (Path(__file__).parents[2] / "docs" / "icd-maps.md").read_text()
    assert rules_table() in page
    assert ties_table() in page


def test_the_report_counts_codes_and_the_cohorts_rows():
    counts = pl.DataFrame({"icd_code": ["I10", "J90", "E780", "J9811"], "count": [9, 2, 4, 5]})
    report = disagreement_report("resolved", "forward_last", counts)
    assert "| 22 | Respiratory failure; insufficiency; arrest (adult) | 28 | 11 | 11 |" in report
    assert "Of them 2 occur in this cohort, in 7 diagnosis rows" in report
    assert report.index("| J9811 | 5 | 20 | none |") < report.index("| J90 | 2 | 20 | none |")
    assert "| J440 | 49122 (CCS 127), 49321 (CCS 128) | 5 " in report


def test_the_naive_rule_moves_hypertension():
    counts = pl.DataFrame({"icd_code": ["I10"], "count": [32]})
    report = disagreement_report("forward_last", "backward_first", counts)
    assert "| I10 | 32 | 13 | 16 |" in report
    assert "tie rule" not in report
