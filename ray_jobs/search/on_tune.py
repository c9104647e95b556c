"""Our side of Ray Tune: it places trials and runs them; what to try and when to end is asked here.

Tune's own snapshots are never read: the study and the trials' folders say where a search stands.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune import search as tune_search
from ray.tune import stopper

from ray_jobs import capacity
from ray_jobs.search import runner

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ray_jobs.capacity import Resources
    from ray_jobs.config import ScalingConfig
    from ray_jobs.search.drive import Drive
    from ray_jobs.search.runner import Job

# A trial's own process waits for its workers. CPUs would be taken from those; it holds this memory.
DRIVER_BYTES = 200 * 2**20
PROCESS_FAILURES = 2
LOOK_AT_NODES_EVERY_S = 2.0
_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_SYNCER": "1",
    "TUNE_WARN_THRESHOLD_S": "60",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class Proposals(tune_search.Searcher):
    """Tune's search algorithm: asks the director."""

    def __init__(self, director: Drive) -> None:
        super().__init__()
        self._director: Drive | None = director
        self._jobs: dict[str, Job] = {}

    def suggest(self, trial_id: str) -> Any:
        """A job, None to wait, or FINISHED."""
        assert self._director is not None
        job = self._director.propose()
        if isinstance(job, bool):
            return tune_search.Searcher.FINISHED if job else None
        self._jobs[trial_id] = job
        return {"job": json.dumps(asdict(job))}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """A trial reported."""
        assert self._director is not None
        kind, value = json.loads(result["told"])
        self._director.told(self._jobs[trial_id], kind, value)

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """A trial's process ended, or died too often."""
        assert self._director is not None
        self._director.gone(self._jobs.pop(trial_id))

    def set_search_properties(self, *args: Any, **kwargs: Any) -> bool:
        """The metric is the director's matter."""
        return True

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: the study is the memory."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_director": None, "_jobs": {}}


class Halt(stopper.Stopper):
    """Tune's stopper: ends everything once the director says so."""

    def __init__(self, director: Drive) -> None:
        self._director: Drive | None = director

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Single trials are asked by a file instead, so that they end with a checkpoint."""
        return False

    def stop_all(self) -> bool:
        """Whether to end all trials."""
        return self._director is not None and self._director.halted

    def __getstate__(self) -> dict[str, Any]:
        return {"_director": None}


class OnTune:
    """Runs jobs by Ray Tune, as many at once as the cluster has room for."""

    def __init__(self, scaling: ScalingConfig, trainable: Any = runner.on_tune) -> None:
        """Run trials whose workers `scaling` describes.

        Args:
            scaling: Of each trial.
            trainable: Given the payload and Tune's config of a trial, which holds the `job`.
        """
        self._trainable = trainable
        self._workers = scaling.most
        self._needed = capacity.per_worker(scaling)
        self._looked = 0.0
        self._rooms = (1, 1)

    def lacks(self, running: int, begun: int) -> str | None:
        """Why one more has to wait, while `running` run and the workers of `begun` have started.

        None where it has not to.
        """
        now = time.monotonic()
        if now - self._looked > LOOK_AT_NODES_EVERY_S:
            self._looked = now
            self._rooms = self._count(capacity.lasting_nodes()), self._count(capacity.free_nodes())
        whole, free = self._rooms
        each = ", ".join(f"{amount:g} {name}" for name, amount in self._needed.items())
        wanted = f"{self._workers} worker(s), each with {each}"
        if running >= max(1, whole):
            return f"{wanted}; the cluster holds {max(1, whole)} such trial(s) at once"
        if running and free <= running - begun:
            return f"{wanted}; what the cluster has left is taken"
        if not running and not free:
            return f"{wanted}; all is taken by others"
        return None

    def run(self, director: Drive, payload: Mapping[str, Any], storage: Path) -> None:
        """Run what the director proposes until it has nothing more."""
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        bundle = tune.PlacementGroupFactory([{"memory": float(DRIVER_BYTES)}])
        tuner = tune.Tuner(
            tune.with_resources(partial(self._trainable, dict(payload)), bundle),
            tune_config=tune.TuneConfig(
                search_alg=Proposals(director),
                num_samples=-1,
                trial_dirname_creator=_name,
                trial_name_creator=_name,
                reuse_actors=False,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(storage.absolute()),
                failure_config=tune.FailureConfig(max_failures=PROCESS_FAILURES),
                stop=Halt(director),
                verbose=0,
            ),
        )
        tuner.fit()

    def _count(self, nodes: Mapping[str, Resources]) -> int:
        rooms = capacity.rooms(self._needed, list(nodes.values()))
        return 1 if rooms is None else rooms // self._workers


def _name(trial: Any) -> str:
    return str(json.loads(trial.config["job"])["name"])
