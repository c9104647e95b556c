"""One trial: an ordinary run with other values, told of after every epoch.

It runs in a process of its own, which Tune starts; its workers are Ray Train's, as of any run.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.errors import InputError
from fusion.training import metrics_log
from ray_jobs import config as run_config
from ray_jobs import lineage, storage, train
from ray_jobs.config_paths import replaced
from ray_jobs.progress import Follower
from ray_jobs.runs import RunFolder
from ray_jobs.search.folder import SearchFolder, asked

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ray_jobs.config import RunConfig
    from ray_jobs.heartbeat import Status
    from ray_jobs.search.space import Scalar

State = Literal["finished", "interrupted", "failed"]
RELEASE_S = 180.0
REASON_CHARACTERS = 500


@dataclass(frozen=True)
class Job:
    """A run to train within a search.

    Attributes:
        name: Its folder's, within the search's.
        number: The trial's, or its place in a list.
        values: Dotted path -> value, in place of the searched run's.
    """

    name: str
    number: int
    values: dict[str, Scalar]


@dataclass(frozen=True)
class Ending:
    """How a trial ended.

    Attributes:
        state: "interrupted" where a checkpoint was asked for before the run's end.
        reason: Why it failed, or was asked to end.
        values: The validation's, of the weights that the run keeps.
        epoch: Epochs trained when those weights were reached.
    """

    state: State
    reason: str = ""
    values: dict[str, float] = field(default_factory=dict)
    epoch: int | None = None


class NotBegunError(KeyboardInterrupt):
    """Asked to end before a worker had started."""


def on_tune(payload: Mapping[str, Any], config: dict[str, Any]) -> None:
    """Tune's trainable: the job in `config`, told of by its reports.

    Args:
        payload: `run`, the searched run's config as JSON; `folder`, the search's.
        config: `job`, as JSON.
    """
    from ray import tune

    job = Job(**json.loads(config["job"]))

    def tell(kind: str, told: Any) -> None:
        # As text: Tune flattens what is nested. Returns once the driver has heard it.
        tune.report({"told": json.dumps([kind, told])})

    run = run_config.from_dump(payload["run"])
    tell("ending", asdict(run_job(run, SearchFolder(Path(payload["folder"])), job, tell)))


def job_config(run: RunConfig, folder: SearchFolder, job: Job) -> RunConfig:
    """The config of a job: its run lies in the search's folder, and below it in a bucket.

    Raises:
        InputError: The run's schema refuses the values together.
    """
    bucket = run.storage_path if storage.in_bucket(run.storage_path) else None
    below = None if bucket is None else storage.below(bucket, folder.path.name)
    place = {"name": job.name, "runs_dir": folder.path, "storage_path": below}
    named = run.model_copy(update=place)
    return replaced(named, job.values)


def run_job(
    run: RunConfig, folder: SearchFolder, job: Job, tell: Callable[[str, Any], None]
) -> Ending:
    """Train a job from where its folder stands to its end, or to where it is asked to stop.

    Args:
        run: What is searched.
        folder: The search's.
        job: What to train.
        tell: Given ("begun", None) once workers move, ("epoch", {epoch, values}) after each
            validation, those of earlier commands first.

    Returns:
        How it ended; nothing that a trial runs into is raised.
    """
    listener = Listener(folder.path / job.name, folder.asks / job.name, tell)
    try:
        config = job_config(run, folder, job)
        _wait_for_release(RunFolder(config.folder))
        listener.history()
        if listener.why is None:
            train.run(config, observer=train.Observer(watch=listener.watch))
        listener.hear()
    except InputError as error:
        return Ending("failed", _reason(error))
    except KeyboardInterrupt as error:
        listener.hear()
        return Ending("interrupted", listener.why or _reason(error))
    except Exception as error:  # out of memory, a library's fault: this trial's alone
        return Ending("failed", f"{type(error).__name__}: {_reason(error)}")
    if not RunFolder(config.folder).outcome.is_file():
        return Ending("interrupted", listener.why or "")
    epoch, values = kept(config)
    return Ending("finished", values=values, epoch=epoch)


class Listener:
    """Beside a trial's run: tells of its epochs, and passes on what is asked of it."""

    def __init__(self, folder: Path, ask: Path, tell: Callable[[str, Any], None]) -> None:
        """Listen to the run in `folder`, which `ask` may ask to end."""
        self._folder = folder
        self._ask = ask
        self._tell = tell
        self._follower = Follower(folder / "metrics")
        self._begun = False

    @property
    def why(self) -> str | None:
        """Why the run is asked to end."""
        return asked(self._ask)

    def history(self) -> None:
        """Tell of the epochs of earlier commands; the driver may have died before it heard."""
        self._epochs(metrics_log.read(self._folder / "metrics"))

    def hear(self) -> None:
        """Tell of new epochs."""
        self._epochs(self._follower.new_lines())

    def watch(self, status: Status) -> None:
        """Told twice a second of the workers."""
        if status.beats and not self._begun:
            self._begun = True
            self._tell("begun", None)
        self.hear()
        why = self.why
        if why is None:
            return
        if not status.beats:
            raise NotBegunError(why)
        (self._folder / train.STOP).touch()

    def _epochs(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line["kind"] == "val":
                self._tell("epoch", {"epoch": line["epoch"], "values": line["values"]})


def kept(config: RunConfig) -> tuple[int | None, dict[str, float]]:
    """Epoch and validation values of the weights that a finished run keeps in best/."""
    lines = [
        line
        for line in metrics_log.read(RunFolder(config.folder).metrics)
        if line["kind"] == "val" and (config.train.restore == "last" or line["values"].get("best"))
    ]
    if not lines:
        return None, {}
    numbers = {
        name: float(value)
        for name, value in lines[-1]["values"].items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return lines[-1]["epoch"], numbers


def _wait_for_release(folder: RunFolder) -> None:
    """A killed driver's trial takes a moment to die; until then the folder is its own."""
    deadline = time.monotonic() + RELEASE_S
    while folder.path.is_dir():
        try:
            with lineage.locked(folder):
                return
        except InputError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _reason(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text[:REASON_CHARACTERS]
