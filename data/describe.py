"""A finished extraction in words: cohort, attrition, labels, modalities, what was set aside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar, get_args

from data.manifest import Manifest
from data.map_report import TIES, disagreement_report, rules_table, ties_table
from data.ontology import Rule, disagreement
from data.shards import missing_classes
from data.splits import SPLITS
from data.tasks import PHENOTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

Value = TypeVar("Value")
_SMALL_CELL: Final = 10


def describe(out: Path) -> str:
    """The text of `rayfuse data describe`.

    Counts of patients or rows below ten are shown as `<10`, so that the text may be passed on.

    Raises:
        InputError: There is no finished extraction in the folder.
    """
    manifest = Manifest.load(out)
    parts = [
        _cohort(manifest),
        _flow(manifest),
        _labels(manifest),
        _overlap(manifest),
        _set_aside(manifest),
    ]
    if warnings := missing_classes(manifest):
        parts.append("Warnings\n" + "\n".join(f"  {line}" for line in warnings))
    if manifest.labels == tuple(name for name, _ in PHENOTYPES):
        parts.append(_rules(manifest))
    return "\n\n".join(part for part in parts if part)


def _cohort(manifest: Manifest) -> str:
    splits = ", ".join(f"{name} {_cell(rows)}" for name, rows in _in_order(manifest.splits))
    return "\n".join(
        [
            f"{manifest.task} from {manifest.release}, preset {manifest.preset}",
            f"  samples     {_cell(manifest.rows)} ({splits})",
            f"  shards      {len(manifest.files)}",
            f"  manifest    {manifest.digest[:16]}, config {manifest.config_hash[:16]}",
            *(f"  {name:<11} {digest[:16]}" for name, digest in manifest.sources.items()),
        ]
    )


def _flow(manifest: Manifest) -> str:
    rows = [("rule", "unit", "in", "out", "removed")]
    rows += [
        (
            step.rule,
            step.unit,
            _cell(step.rows_in),
            _cell(step.rows_out),
            _cell(step.rows_in - step.rows_out),
        )
        for step in manifest.flow
    ]
    return "Attrition\n" + table(rows)


def _labels(manifest: Manifest) -> str:
    splits = [name for name, _ in _in_order(manifest.prevalence)]
    rows: list[tuple[str, ...]] = [("label", *splits)]
    for index, label in enumerate(manifest.labels):
        cells = []
        for split in splits:
            share = manifest.prevalence[split][index]
            few = 0 < round(share * manifest.splits[split]) < _SMALL_CELL
            cells.append("few" if few else f"{share:.3f}")
        rows.append((label, *cells))
    return "Positive share of each label\n" + table(rows)


def _overlap(manifest: Manifest) -> str:
    kinds = sorted({kind for counts in manifest.overlap.values() for kind in counts})
    splits = _in_order(manifest.overlap)
    rows: list[tuple[str, ...]] = [("rows with", *(name for name, _ in splits))]
    rows += [(kind, *(_cell(counts.get(kind, 0)) for _, counts in splits)) for kind in kinds]
    return "Modalities\n" + table(rows)


def _set_aside(manifest: Manifest) -> str:
    lines = [
        f"  {item.place}: {item.reason}: {item.count}"
        + (f" (e.g. {', '.join(item.examples[:3])})" if item.examples else "")
        for item in manifest.quarantine
    ]
    repaired = [f"  {name}: {count}" for name, count in manifest.counters.items() if count]
    text = "Set aside\n" + ("\n".join(lines) or "  nothing")
    return text + ("\n\nRepaired\n" + "\n".join(repaired) if repaired else "")


def _rules(manifest: Manifest) -> str:
    """How the map of this extraction differs from the others."""
    used = manifest.config["icd10_map"]
    lines = [f"ICD-10 maps: this cohort is labelled by `{used}`"]
    for other in get_args(Rule):
        if other != used:
            differing = disagreement(used, other).codes.height
            lines.append(f"  {differing:,} ICD-10 codes get other labels under `{other}`")
    reports = [
        disagreement_report(used, other, ties=False) for other in get_args(Rule) if other != used
    ]
    return "\n\n".join(
        [
            "\n".join(lines),
            "ICD-10 codes with each label under each map\n" + rules_table(),
            *(report.rstrip("\n") for report in reports),
            TIES,
            ties_table(),
        ]
    )


def _in_order(of_split: Mapping[str, Value]) -> list[tuple[str, Value]]:
    return [(name, of_split[name]) for name in SPLITS if name in of_split]


def _cell(count: int) -> str:
    return f"<{_SMALL_CELL}" if 0 < count < _SMALL_CELL else f"{count:,}"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as aligned text, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)
