from __future__ import annotations

from pathlib import Path

from data.map_report import disagreement_report, rules_table, ties_table


def test_the_page_shows_what_the_code_does():
    page = (Path(__file__).parents[2] / "docs" / "icd-maps.md").read_text()
    assert rules_table() in page
    assert ties_table() in page


def test_the_report_shows_both_rules_and_the_ties():
    report = disagreement_report("resolved", "forward_last")
    row = "| 22 | Respiratory failure; insufficiency; arrest (adult) | 28 | 11 | 11 | 17 | 0 |"
    assert row in report
    assert "| J440 | 49122 (CCS 127), 49321 (CCS 128) | 5 " in report
    assert ties_table() in report


def test_ties_are_only_shown_where_they_matter():
    assert "tie rule" not in disagreement_report("forward_last", "backward_first")
