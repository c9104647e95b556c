"""What was minimised since the last line of the log."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.training.strategy import Strategy


class Meter:
    """Sums of what was minimised since the last line of the log."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, name: str, total: Tensor, rows: Tensor) -> None:
        """Add this worker's sum of a term, and the rows that the whole step counts for it."""
        self._sums[name] = self._sums.get(name, 0) + total.double()
        self._rows[name] = self._rows.get(name, 0) + rows.double()

    def means(self, strategy: Strategy) -> dict[str, float]:
        """The mean of each term over all workers, each of whom calls it."""
        names = sorted(self._sums)
        if not names:
            return {}
        totals = strategy.sum(torch.stack([self._sums[name] for name in names]))
        rows = torch.stack([self._rows[name] for name in names]).to(totals.device)
        values = (totals / rows).tolist()
        return {
            name: value for name, value, n in zip(names, values, rows.tolist(), strict=True) if n
        }
