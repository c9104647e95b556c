"""Two runs' predictions pooled by whether a row has an X-ray, and scored once."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from data.errors import InputError
from ray_jobs import cli, ensemble, evaluate, report
from ray_jobs import predictions as prediction_file
from ray_jobs.inference import load_config
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def folders(make_run: Callable) -> list[Path]:
    made = [make_run("medfuse", name="fused"), make_run("lstm", name="series")]
    for folder in made:
        evaluate.run(folder)
    return made


def _table(folder: Path) -> dict[int, dict]:
    path = RunFolder(folder).evaluation("test") / prediction_file.FILE_NAME
    return {row["stay_id"]: row for row in pq.read_table(path).to_pylist()}


def test_each_row_comes_from_its_run_and_the_pool_is_scored_once(folders: list[Path]) -> None:
    command = ["evaluate", str(folders[0]), "--unpaired-from", str(folders[1])]
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    out = folders[0].parent / "fused-with-series"
    fused, series, pooled = (_table(folder) for folder in (*folders, out))
    assert set(pooled) == set(fused) == set(series)
    for key, row in pooled.items():
        assert row == (fused if row["has_cxr"] else series)[key]
    assert {row["has_cxr"] for row in pooled.values()} == {True, False}
    folder = RunFolder(out).evaluation("test")
    assert stat.S_IMODE((folder / prediction_file.FILE_NAME).stat().st_mode) == 0o600
    found = json.loads((folder / evaluate.METRICS_FILE).read_text())
    rows = list(pooled.values())
    expected = roc_auc_score(
        np.array([row["labels"] for row in rows]), np.array([row["probabilities"] for row in rows])
    )
    assert found["sets"]["partial"]["metrics"]["auroc"]["macro"]["value"] == pytest.approx(expected)
    assert load_config(out).name == "fused-with-series"
    alone = json.loads((RunFolder(folders[0]).evaluation("test") / "metrics.json").read_text())
    assert found["sets"]["paired"] == alone["sets"]["paired"]
    assert found["lineage"]["unpaired_rows_from"] == "series"


def test_a_report_shows_and_compares_it(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "both"
    ensemble.run(*folders, out)
    html = report.write_report([folders[0], out], tmp_path / "report.html").read_text()
    assert "both minus fused" in html
    assert "ensemble of medfuse and lstm" in html
    ensemble.run(*folders, out)


def test_what_cannot_be_pooled_is_refused(
    folders: list[Path], make_run: Callable, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="folder of a trained run"):
        ensemble.run(*folders, folders[0])
    fresh = make_run("lstm")
    with pytest.raises(InputError, match="rayfuse evaluate"):
        ensemble.run(folders[0], fresh, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    one = prediction_file.read(RunFolder(folders[0]).evaluation("test") / "predictions.parquet")
    other = replace(one, lineage={**one.lineage, "manifest": "0" * 64})
    with pytest.raises(InputError, match="differ in manifest"):
        ensemble.pool(one, other, name="x")
    shifted = replace(one, targets=1 - one.targets)
    with pytest.raises(InputError, match="did not score the same rows"):
        ensemble.pool(one, shifted, name="x")
