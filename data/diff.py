"""Why two cohorts differ: rule by rule, from their manifests and the samples they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import polars as pl

from data.describe import table
from data.manifest import Manifest
from data.shards import load_excluded

if TYPE_CHECKING:
    from pathlib import Path

_KEYS: Final = ("subject_id", "hadm_id", "stay_id", "dicom_id", "prediction_time", "split")
_COMPARED: Final = ("ehr", "ehr_observed", "labels", "split", "age", "dicom_id")
_EXAMPLES: Final = 5


def diff(a: Path, b: Path) -> str:
    """Explain how the cohort of `b` differs from that of `a`.

    First what differs in the inputs and switches, then each rule with what it removed in both,
    then the stays that only one of them has, each under the rule that removed it from the other,
    and among the common ones how many have another series, label, split, age or image.

    Raises:
        InputError: One of the folders holds no finished extraction, or a file of it was altered.
    """
    first, second = Manifest.load(a), Manifest.load(b)
    parts = [
        _inputs(first, second),
        _rules(first, second),
        _samples(a, b, first, second),
    ]
    return "\n\n".join(parts)


def _inputs(a: Manifest, b: Manifest) -> str:
    left, right = _settings(a), _settings(b)
    rows = [("differs", "A", "B")]
    rows += [
        (name, str(left.get(name, "-")), str(right.get(name, "-")))
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]
    return table(rows) if len(rows) > 1 else "  the same sources, release, task and switches"


def _settings(manifest: Manifest) -> dict[str, Any]:
    return {
        "task": manifest.task,
        "release": manifest.release,
        "preset": manifest.preset,
        "code": manifest.code_version,
        **{f"source {name}": digest[:12] for name, digest in manifest.sources.items()},
        **{f"switch {name}": value for name, value in manifest.config.items()},
    }


def _rules(a: Manifest, b: Manifest) -> str:
    """Every rule of either, with what it removed; `*` where it removed another number."""
    steps_a = {(step.unit, step.rule): step for step in a.flow}
    steps_b = {(step.unit, step.rule): step for step in b.flow}
    rows: list[tuple[str, ...]] = [("rule", "unit", "A in", "A removes", "B in", "B removes", "")]
    blamed = []
    for key in dict.fromkeys([*steps_a, *steps_b]):
        cells = [key[1], key[0]]
        removed: list[int | None] = []
        for step in (steps_a.get(key), steps_b.get(key)):
            lost = None if step is None else step.rows_in - step.rows_out
            removed.append(lost)
            cells += ["-", "-"] if step is None else [f"{step.rows_in:,}", f"{lost:,}"]
        rows.append((*cells, "*" if removed[0] != removed[1] else ""))
        more = (removed[1] or 0) - (removed[0] or 0)
        if more and key[0] in ("stays", "images"):
            blamed.append(
                f"  {'B' if more > 0 else 'A'} loses {abs(more):,} {key[0]} more at {key[1]!r}"
            )
    text = "Rules (* removes another number in B)\n" + table(rows)
    return text + "\n\n" + ("\n".join(blamed) or "  no rule removes another number of samples")


def _samples(a: Path, b: Path, first: Manifest, second: Manifest) -> str:
    left, right = _read(a, first), _read(b, second)
    key = "stay_id" if left["stay_id"].null_count() < left.height else "dicom_id"
    lines = [f"Samples: {left.height:,} in A, {right.height:,} in B"]
    for name, only, other in (
        ("A", left.join(right, on=key, how="anti"), load_excluded(b, second)),
        ("B", right.join(left, on=key, how="anti"), load_excluded(a, first)),
    ):
        ids = ", ".join(str(value) for value in only[key].sort().head(_EXAMPLES))
        more = f" (e.g. {key} {ids})" if only.height else ""
        lines.append(f"  only in {name}: {only.height:,}{more}")
        if key == "stay_id":
            lines += _why_absent(only, other, "B" if name == "A" else "A")
    common = left.join(right, on=key, how="inner", suffix="_b")
    lines.append(f"  in both: {common.height:,}, of which")
    for column in _COMPARED:
        if column == key:
            continue
        same = pl.col(column).eq_missing(pl.col(f"{column}_b"))
        lines.append(f"    {common.filter(~same).height:,} with another {column}")
    return "\n".join(lines)


def _why_absent(only: pl.DataFrame, excluded: pl.DataFrame, name: str) -> list[str]:
    """The rules of the other cohort that removed these stays, each with how many and examples."""
    why = only.select("stay_id").join(excluded, on="stay_id", how="left")
    counted = why.group_by("rule").agg(pl.col("stay_id").sort().head(_EXAMPLES), pl.len())
    lines = []
    for rule, stays, count in counted.sort("len", "rule", descending=[True, False]).rows():
        ids = ", ".join(map(str, stays))
        what = f"removed by {rule!r}" if rule is not None else "not in its icustays table"
        lines.append(
            f"    {count:,} in {name} {what}: {ids}{', ...' if count > len(stays) else ''}"
        )
    return lines


def _read(folder: Path, manifest: Manifest) -> pl.DataFrame:
    """The keys, and each compared column that is a list as a hash of its bytes."""
    columns = list(dict.fromkeys([*_KEYS, *_COMPARED]))
    frames = [
        pl.read_parquet(folder / file.name, columns=columns).with_columns(
            pl.col("ehr", "ehr_observed").cast(pl.List(pl.String)).list.join(",").hash(seed=0)
        )
        for file in manifest.files
    ]
    return pl.concat(frames)
