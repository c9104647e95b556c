"""What a run predicts: its task, with the labels that its shards hold."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from data.manifest import Manifest
from data.tasks import task_spec

if TYPE_CHECKING:
    from data.tasks import TaskSpec
    from ray_jobs.config import RunConfig


def spec_of(config: RunConfig) -> TaskSpec:
    """The task of a run; a hospital's own label file names the labels of a task of admissions.

    Raises:
        InputError: There are no shards.
    """
    spec = task_spec(config.task)
    if spec.unit != "admission":
        return spec
    return replace(spec, labels=Manifest.load(config.data.shards).labels)
