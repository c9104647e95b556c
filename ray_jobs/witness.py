"""Inside Ray Train's controller: tells the ledger why workers are given up, and who controls them.

`ControllerCallback` is Ray's developer API: the one place that knows of losses and of resizing. So
is the list of callbacks that a trainer gives its controller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback

if TYPE_CHECKING:
    from collections.abc import Mapping

LINE = 200


class Trainer(TorchTrainer):
    """Ray's, without the process that hands out Ray Datasets to each group of workers: none."""

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()
        return [each for each in made if not isinstance(each, DatasetsCallback)]


class Witness(ControllerCallback):
    """Travels with the run's config into the controller."""

    def __init__(self, ledger: Any) -> None:
        """Tell `ledger`, an actor's handle."""
        self._ledger = ledger

    def after_controller_start(self, train_run_context: Any) -> None:
        """Give the driver a handle to end the run by."""
        handle = ray.put(ray.get_runtime_context().current_actor)
        self._ledger.control.remote([handle])

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Note why the controller starts the workers again."""
        if type(current_state) is type(previous_state):
            return  # told of every look at running workers
        self._ledger.turned.remote()
        error = getattr(current_state, "training_failed_error", None)
        decision = getattr(current_state, "scaling_decision", None)
        if error is not None:
            self._ledger.lost.remote(cause_of(error))
        elif decision is not None and type(current_state).__name__ == "ResizingState":
            self._ledger.lost.remote(f"the cluster changed: {decision.num_workers} worker(s) now")


def cause_of(error: BaseException) -> str:
    """One line on a failed group of workers."""
    info = getattr(error, "preemption_info", None)
    if info is not None:
        return f"a node was taken away (ranks {', '.join(map(str, info.preempted_ranks))})"
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    # When one dies, the others' collectives fail too: those are not the cause.
    dead = {rank: actor for rank, failure in failures.items() if (actor := _died(failure))}
    if dead:
        ranks = ", ".join(str(rank) for rank in sorted(dead))
        gone = any("node" in str(each) and "terminated" in str(each) for each in dead.values())
        return f"lost the node of rank {ranks}" if gone else f"the process of rank {ranks} died"
    for rank, failure in sorted(failures.items()):
        return f"rank {rank} failed: {_first_line(failure)}"
    return _first_line(error)


def _died(failure: BaseException) -> BaseException | None:
    actor = (
        failure.health_check_failure
        if isinstance(failure, WorkerHealthCheckFailedError)
        else failure
    )
    return actor if isinstance(actor, RayActorError) else None


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:LINE]
