"""Through staging, in two partitions, the released outputs come out all the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from data.extraction import extract_partition
from data.stage import load_tables, stage
from data.switches import ExtractConfig
from data.tasks import task_spec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@pytest.mark.parametrize("preset", ["corrected", "code"])
def test_staged_partitions_give_what_the_raw_tables_give(
    preset: str,
    tmp_path: Path,
    golden_folder: Path,
    golden_tables: Mapping[str, pl.DataFrame],
    code_config: ExtractConfig,
) -> None:
    config = code_config if preset == "code" else ExtractConfig()
    staged = stage(golden_folder / "raw", tmp_path / "staged", partitions=2)
    parts = [
        extract_partition(
            load_tables(tmp_path / "staged", staged.files_of(number)),
            task_spec("phenotyping"),
            config,
        ).samples
        for number in range(2)
    ]
    assert all(part.height > 0 for part in parts)
    together = pl.concat(parts).sort("subject_id", "stay_id")
    whole = extract_partition(golden_tables, task_spec("phenotyping"), config).samples
    assert_frame_equal(together, whole, check_exact=True)
