"""A written hospital of each layout, and the clean features of many drawn stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest

from data.sources.synthetic import HospitalConfig, SyntheticTruth, generate
from data.sources.synthetic.people import draw_block
from data.sources.synthetic.vitals import VITALS, beliefs, draw_course

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def iv_hospital(tmp_path_factory: pytest.TempPathFactory) -> SyntheticTruth:
    out = tmp_path_factory.mktemp("iv") / "hospital"
    return generate(out, patients=130, seed=3, release="mimic-iv-2.2", image_size=64)


@pytest.fixture(scope="session")
def iii_hospital(tmp_path_factory: pytest.TempPathFactory) -> SyntheticTruth:
    out = tmp_path_factory.mktemp("iii") / "hospital"
    return generate(out, patients=130, seed=3, release="mimic-iii-1.4", cxr=False)


@dataclass(frozen=True)
class Drawn:
    """Stays drawn without being written: [S, 48, 8] charted values (NaN elsewhere) and truth."""

    values: np.ndarray
    latents: np.ndarray
    labels: np.ndarray
    beliefs: np.ndarray
    hours: np.ndarray


@pytest.fixture(scope="session")
def drawn() -> Drawn:
    config = HospitalConfig()
    parts = []
    for number in range(120):
        rng = np.random.default_rng([11, number])
        block = draw_block(number, 11, config, rng)
        course = draw_course(block, config, rng)
        values = np.full((len(block.stay), 48, len(VITALS)), np.nan)
        early = course.hour < 48
        values[course.stay[early], course.hour[early]] = np.where(
            course.charted[early], course.values[early], np.nan
        )
        at = block.stay_admission
        found = beliefs(block, course, config)
        parts.append((values, block.latents[at], block.labels[at], found, block.hours))
    return Drawn(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@pytest.fixture
def tree() -> object:
    def listed(root: Path) -> dict[str, bytes]:
        return {
            str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
        }

    return listed
