"""Batches made up for tests: `make_batch` is a factory fixture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import pytest
import torch

from data.schema import N_FEATURES, Batch

if TYPE_CHECKING:
    from collections.abc import Sequence


class MakeBatch(Protocol):
    def __call__(
        self,
        rows: int = 4,
        steps: int = 6,
        image_size: int = 32,
        classes: int = 3,
        *,
        present_cxr: Sequence[bool] | None = None,
        present_ehr: Sequence[bool] | None = None,
        lengths: Sequence[int] | None = None,
        seed: int = 0,
    ) -> Batch: ...


def batch(
    rows: int = 4,
    steps: int = 6,
    image_size: int = 32,
    classes: int = 3,
    *,
    present_cxr: Sequence[bool] | None = None,
    present_ehr: Sequence[bool] | None = None,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
) -> Batch:
    """Random rows; by default every second one has an image, all have a series."""
    rng = torch.Generator().manual_seed(seed)
    cxr = torch.tensor(list(present_cxr or [row % 2 == 0 for row in range(rows)]))
    ehr = torch.tensor(list(present_ehr or [True] * rows))
    assert len(cxr) == len(ehr) == rows
    if lengths is None:
        drawn = torch.randint(1, steps + 1, (rows,), generator=rng)
        drawn[0] = steps
    else:
        drawn = torch.tensor(list(lengths))
    drawn = torch.where(ehr, drawn, 1)
    series = torch.randn(rows, steps, N_FEATURES, generator=rng)
    valid = (torch.arange(steps) < drawn[:, None]) & ehr[:, None]
    images = torch.randn(rows, 3, image_size, image_size, generator=rng)
    radiology = torch.randint(0, 2, (rows, 14), generator=rng).float()
    index = cxr.nonzero().squeeze(1)
    return Batch(
        ehr=series * valid[:, :, None],
        lengths=drawn,
        cxr=images[index],
        cxr_index=index,
        present={"ehr": ehr, "cxr": cxr},
        targets=torch.randint(0, 2, (rows, classes), generator=rng).float(),
        cxr_targets=radiology[index],
        rows=np.arange(rows),
    )


@pytest.fixture
def make_batch() -> MakeBatch:
    return batch
