from __future__ import annotations

from collections import defaultdict

import pytest

from data import ontology
from data.ontology import backward_gem, icd9_groups, phenotype_map
from data.tasks import PHENOTYPES


def labels_of(rule: str, version: int, code: str) -> set[int]:
    table = phenotype_map(rule)
    rows = table.filter((table["icd_version"] == version) & (table["icd_code"] == code))
    return set(rows["label"])


@pytest.mark.parametrize(
    ("code", "labels"),
    [
        ("I10", {13}),
        ("I2510", {9}),
        ("J440", {5}),
        ("J441", {5}),
        ("J449", {5}),
        ("K7581", {17}),
        ("R6521", {23, 24}),
        ("E785", {12}),
        ("J9601", {22}),
        ("J9811", {20}),
        ("N179", {0}),
        ("Z00", set()),
    ],
)
def test_resolved_rule_on_codes_known_by_hand(code, labels):
    assert labels_of("resolved", 10, code) == labels


def test_icd9_goes_straight_to_its_group_under_every_rule():
    for rule in ("resolved", "forward_last", "backward_first"):
        assert labels_of(rule, 9, "4019") == {13}
        assert labels_of(rule, 9, "0389") == {23}
        assert labels_of(rule, 9, "389") == set()


def test_naive_rules_fall_into_their_traps():
    assert labels_of("backward_first", 10, "I10") == {16}
    for missing in ("J9601", "I639", "I480", "J90", "J9811", "E1122", "E7800", "K7460", "A4181"):
        assert labels_of("forward_last", 10, missing) == set()
        assert labels_of("resolved", 10, missing) != set()
    assert labels_of("forward_last", 10, "I10") == {13}
    assert labels_of("forward_last", 10, "J99") == {18}


def test_the_version_is_part_of_the_key():
    assert labels_of("resolved", 10, "E8490") == set() == labels_of("resolved", 9, "E8490")
    both = icd9_groups().keys() & backward_gem().keys()
    assert len(both) == 42
    assert all(code.startswith(("E", "V")) for code in both)
    # One string, two diagnoses: the groups of the two versions are not the same anywhere.
    for code in both:
        targets = {icd9_groups()[row.target] for row in backward_gem()[code]}
        assert icd9_groups()[code] not in targets


def test_counts_of_the_public_files():
    assert len(backward_gem()) == 71_704
    several = {code for code, rows in backward_gem().items() if len(rows) > 1}
    assert len(several) == 7_862
    groups = {code: {icd9_groups()[row.target] for row in backward_gem()[code]} for code in several}
    assert sum(len(found) > 1 for found in groups.values()) == 3_723
    assert len(ontology.straddling()) == 222
    assert len(icd9_groups()) == 15_072


def test_the_released_rule_reaches_568_of_2135_codes():
    reachable = {
        code
        for code, rows in backward_gem().items()
        if any(icd9_groups()[row.target] in ontology.LABEL_OF_GROUP for row in rows)
    }
    assert len(reachable) == 2_135
    released = set(
        phenotype_map("forward_last").filter(phenotype_map("forward_last")["icd_version"] == 10)[
            "icd_code"
        ]
    )
    assert len(reachable & released) == 568


def test_coverage_by_group():
    covered = {label: (present, reachable) for label, _, reachable, present in _coverage_rows()}
    assert covered[1] == (20, 143)
    assert covered[6] == (118, 976)
    assert covered[10] == (35, 423)
    assert covered[9] == (16, 53)
    assert covered[22] == (11, 28)
    assert covered[23] == (24, 45)
    assert covered[3] == (12, 22)
    assert covered[0] == (6, 6)
    assert covered[15] == (24, 24)


def _coverage_rows():
    return ontology.coverage().select("label", "name", "reachable", "present").rows()


def test_forward_last_equals_a_literal_walk_over_the_forward_gem():
    expected: dict[str, int] = {}
    for icd9 in sorted(ontology.forward_gem()):
        rows = ontology.forward_gem()[icd9]
        group = icd9_groups().get(icd9)
        if rows and group in ontology.LABEL_OF_GROUP:
            expected[rows[-1].target] = ontology.LABEL_OF_GROUP[group]
    table = phenotype_map("forward_last")
    got = dict(table.filter(table["icd_version"] == 10).select("icd_code", "label").rows())
    assert got == expected
    assert len(got) > 560


def test_resolution_equals_a_slow_vote():
    """The steps (a), (b), (c), written again with plain counting."""
    reached_from = defaultdict(set)
    for icd9, rows in ontology.forward_gem().items():
        for row in rows:
            reached_from[row.target].add(icd9)
    steps = defaultdict(int)
    for code, resolution in ontology.straddling().items():
        plain = [row.target for row in backward_gem()[code] if row.flags[2] == "0"]
        votes = plain + [icd9 for icd9 in reached_from[code] if icd9 in icd9_groups()]
        tally = defaultdict(int)
        for icd9 in votes:
            tally[icd9_groups()[icd9]] += 1
        winners = [group for group in tally if tally[group] == max(tally.values())]
        if len(winners) > 1:
            known = [group for group in winners if group in ontology.CCS_GROUPS]
            tied = sorted(icd9 for icd9 in votes if icd9_groups()[icd9] in winners)
            winners = known if len(known) == 1 else [icd9_groups()[tied[0]]]
        assert resolution.group == winners[0], code
        assert resolution.group in {group for _, group in resolution.candidates}
        steps[resolution.step] += 1
    assert steps == {"majority": 70, "benchmark": 13, "smallest": 139}


def test_combination_rows_give_the_union_of_their_groups():
    rows = backward_gem()["R6521"]
    assert {row.target for row in rows} == {"99592", "78552"}
    assert all(row.combination for row in rows)


def test_every_benchmark_tie_names_one_label_and_its_alternatives():
    ties = ontology.tie_decided()
    assert ties.height == 13
    for row in ties.iter_rows(named=True):
        assert ontology.CCS_GROUPS[row["label"]] in row["ccs_groups"]
        assert labels_of("resolved", 10, row["icd_code"]) == {row["label"]}
    assert {"J440", "J441", "K7581"} <= set(ties["icd_code"])


def test_disagreement_counts_add_up():
    report = ontology.disagreement("resolved", "forward_last")
    for row in report.by_label.iter_rows(named=True):
        assert row["codes_a"] == row["both"] + row["only_a"]
        assert row["codes_b"] == row["both"] + row["only_b"]
    assert report.by_label["only_a"].sum() > 1_500
    assert report.codes.filter(report.codes["icd_code"] == "J9811").rows() == [("J9811", [20], [])]
    assert "I10" not in set(report.codes["icd_code"])
    same = ontology.disagreement("resolved", "resolved")
    assert same.codes.is_empty()
    assert same.by_label["only_a"].sum() == 0 == same.by_label["only_b"].sum()


@pytest.mark.parametrize(
    ("code", "labels"),
    [
        ("I4820", {3}),  # younger than the GEMs: I48.2
        ("E8720", {14}),  # E87.2
        ("E780", {12}),  # divided in 2017: E78.00 and E78.01 agree
        ("I63", {1}),  # a heading whose divisions agree
        ("E11", set()),  # its divisions do not share a label
        ("U071", set()),
        ("J9", set()),
        ("I10", {13}),
    ],
)
def test_codes_the_gems_do_not_know(code, labels):
    assert ontology.resolved_labels(code) == labels


def test_order_and_types_of_the_labels():
    names = [name for name, _ in PHENOTYPES]
    kinds = [kind for _, kind in PHENOTYPES]
    assert names == sorted(names)
    assert [kinds.count(kind) for kind in ("acute", "mixed", "chronic")] == [13, 5, 7]
    assert len(set(ontology.CCS_GROUPS)) == 25
