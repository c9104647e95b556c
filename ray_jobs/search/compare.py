"""`rayfuse tune --compare A B`: two searches side by side, their winners on the same rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data.errors import InputError
from ray_jobs.report import interval_text
from ray_jobs.search import confirm
from ray_jobs.search.cost import worker_hours
from ray_jobs.search.folder import SearchFolder

if TYPE_CHECKING:
    from pathlib import Path

    from fusion.metrics.bootstrap import Scores


def compare(first: Path, second: Path) -> str:
    """A table of both, and the first's winner minus the second's on the test split.

    Raises:
        InputError: One is no search, has no results yet, or they searched by other metrics.
    """
    folders = SearchFolder(first), SearchFolder(second)
    found = [_results(folder) for folder in folders]
    if found[0]["metric"] != found[1]["metric"]:
        raise InputError(
            f"{first} chose by {found[0]['metric']}, {second} by {found[1]['metric']}; compare "
            "searches of one metric"
        )
    rows = [("", first.name, second.name)]
    columns = [_facts(folder, each) for folder, each in zip(folders, found, strict=True)]
    rows += [(name, columns[0][name], columns[1][name]) for name in columns[0]]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *_difference(folders, found)])


def _results(folder: SearchFolder) -> dict[str, Any]:
    folder.load()
    found = confirm.read(folder)
    if found is None:
        raise InputError(f"{folder.path}: has no winner yet; the same `rayfuse tune` goes on")
    return found


def _facts(folder: SearchFolder, found: dict[str, Any]) -> dict[str, str]:
    (row,) = (each for each in found["candidates"] if each["name"] == found["winner"])
    metric = found["metric"]
    facts = {
        "trials": str(found["trials"]),
        "worker-hours": f"{sum(worker_hours(run / 'metrics') for run in folder.runs()):.2f}",
        "winner": found["winner"],
        f"validation {metric} in the search": f"{row['searched']:.4f}",
        "its mean over new seeds": f"{row['mean']:.4f}",
        "optimism": f"{found['optimism']:.4f}",
    }
    for name, scores in (found["test"] or {}).items():
        facts[f"test {name}"] = interval_text(scores["winner"])
        facts[f"test {name}, minus default"] = interval_text(scores["difference"])
    return facts


def _difference(
    folders: tuple[SearchFolder, SearchFolder], found: list[dict[str, Any]]
) -> list[str]:
    if not all(each["test"] for each in found):
        return ["one of them was not tested, so their winners are not compared"]
    sides = [
        confirm.runs_of(folder, each["winner"]) for folder, each in zip(folders, found, strict=True)
    ]
    if not confirm.same_patients(sides[0][0], sides[1][0]):
        return ["their winners were not tested on the same rows, so they are not compared"]
    one, other = (confirm.mean_scores(runs) for runs in sides)
    pair = f"{folders[0].path.name} minus {folders[1].path.name}, winners, same patients"
    return [
        f"{pair}: test {name} {interval_text(value.to_json())}"
        for name, value in _means(one, other).items()
    ]


def _means(one: Scores, other: Scores) -> dict[str, Any]:
    difference = confirm.minus(one, other)
    return {name: difference.mean(name) for name in difference.point}
