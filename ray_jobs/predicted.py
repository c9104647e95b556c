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
    """The task of a run; of admissions, with the labels of the shards and how often they are true.

    A hospital's own label file names other labels than the task's.

    Raises:
        InputError: There are no shards.
    """
    spec = task_spec(config.task)
    if spec.unit != "admission":
        return spec
    manifest = Manifest.load(config.data.shards)
    return replace(spec, labels=manifest.labels, prevalence=manifest.prevalence.get("train", ()))
