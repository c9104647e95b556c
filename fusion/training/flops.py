"""Model FLOPs of a step: counted on tensors without values, so that any device may be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusion.training.optim import OptimConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusion.model import FusionModel
    from fusion.tasks import Task
    from fusion.training.config import TrainConfig

LENGTHS = (2, 4, 8)


@dataclass(frozen=True)
class Work:
    """What was trained on, summed: rows, steps of their series, squared steps, images."""

    rows: float = 0.0
    steps: float = 0.0
    squared: float = 0.0
    images: float = 0.0


@dataclass(frozen=True)
class Flops:
    """FLOPs of training, forward and backward.

    `row + step * T + squared * T^2` for a row whose series has T steps, and `image` for its image.
    Recurrent layers are linear in T and attention is quadratic, so three lengths tell all. Padding
    and recomputation count for nothing.
    """

    row: float
    step: float
    squared: float
    image: float

    def of(self, work: Work) -> float:
        """FLOPs of what was trained on."""
        series = self.row * work.rows + self.step * work.steps + self.squared * work.squared
        return series + self.image * work.images


def count_flops(
    factory: Callable[[], FusionModel], task: Task, train: TrainConfig, image_size: int
) -> Flops:
    """The FLOPs of a model: a few dry steps.

    Args:
        factory: Builds the model.
        task: The loss.
        train: Precision and memory format.
        image_size: Pixels of an image's side.

    Raises:
        InputError: The model's shapes depend on the values of its input.
    """
    from fusion.planning.dry import Rows, dry_step  # seconds that most workers never need

    def count(rows: int, length: int, images: int) -> float:
        shape = Rows((length,) * rows, images, image_size)
        return dry_step(factory, task, train, OptimConfig(), shape, update=False).flops

    # Without images an encoder runs on two stand-ins, so differences are taken above them.
    more_images = count(6, LENGTHS[0], 4) - count(6, LENGTHS[0], 2)
    by_row = [(count(6, each, 2) - count(4, each, 2)) / 2 for each in LENGTHS]
    (a, b, c), (x, y, z) = LENGTHS, by_row
    squared = ((z - x) / (c - a) - (y - x) / (b - a)) / (c - b)
    step = (y - x) / (b - a) - squared * (a + b)
    return Flops(x - step * a - squared * a * a, step, squared, more_images / 2)
