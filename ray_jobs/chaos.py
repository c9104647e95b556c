"""`rayfuse chaos`: one small run undisturbed, then once per fault; the results must be the same.

Every fault is real: signals by process id sent from the node that the process lives on, a drained
node, rows of NaN, a byte of a shard, a file that may not grow.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from data.errors import InputError
from fusion.training import metrics_log
from ray_jobs import config as run_config
from ray_jobs import faults, train
from ray_jobs.chaos_table import Outcome, difference, line_of
from ray_jobs.faults import Disturbance, Strikers
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ray_jobs.config import RunConfig
    from ray_jobs.heartbeat import Beat, Status

BY_ITSELF = "went on by itself"
COMMAND = "stopped; the same command went on"
PACE_S = 0.25
HANG_S = 20.0
NOTICE_S = 120.0
START_S = 300.0


class SkippedError(Exception):
    """A fault that this cluster or run cannot show, and why."""


@dataclass
class Bench:
    """The run that is disturbed, and what strikes it.

    Attributes:
        config: The run; each fault's has its own name.
        strikers: On every node.
        synthetic: Its shards were made for this, so that one may be altered.
        at: Steps after which a fault comes: past the first checkpoint, and between two.
    """

    config: RunConfig
    strikers: Strikers
    synthetic: bool
    at: int = field(init=False)

    def __post_init__(self) -> None:
        every = self.config.checkpoint.every_steps or 1
        self.at = every + max(1, every // 2)

    def named(self, fault: str, **scaling: Any) -> RunConfig:
        """The run under a fault's name."""
        changed = self.config.scaling.model_copy(update=scaling)
        return self.config.model_copy(update={"name": f"chaos-{fault}", "scaling": changed})

    def run(
        self, config: RunConfig, disturbance: Disturbance, strike: Callable[[Status], bool] | None
    ) -> None:
        """Train; `strike` is called once the run is far enough, until it says that it struck."""
        struck = strike is None

        def watch(status: Status) -> None:
            nonlocal struck
            if not struck and strike is not None:
                reached = max((beat.updates for beat in status.beats), default=0)
                struck = reached >= self.at and status.groups == 1 and strike(status)

        train.run(config, observer=train.Observer(watch, disturbance))
        if not struck:
            raise SkippedError(f"the run ended before step {self.at}: let it train longer")


def worker(bench: Bench) -> str:
    """SIGKILL the worker with the highest rank."""

    def strike(status: Status) -> bool:
        victim = status.beats[-1]
        _require(bench.strikers.kill(victim.node, victim.pid), f"process {victim.pid} lives on")
        return True

    bench.run(bench.named("worker"), Disturbance(PACE_S), strike)
    return BY_ITSELF


def node(bench: Bench) -> str:
    """SIGKILL the raylet and all workers of a node that is not the driver's."""
    victims: list[Beat] = []

    def strike(status: Status) -> bool:
        victims.append(_elsewhere(status))
        gone = bench.strikers.end_node(victims[0].node)
        _require(gone, "the cluster still counts on the node")
        return True

    config = bench.named("node")
    bench.run(config, Disturbance(PACE_S), strike)
    said, rank = _recoveries(config)[-1]["cause"], victims[0].rank
    # Whichever Ray hears of first: the node's death or the process's.
    named = re.match(r"(lost the node|the process) of rank ([\d, ]+)", said)
    _require(
        named is not None and str(rank) in re.findall(r"\d+", named[2]),
        f"the node of rank {rank} was ended, but the log says: {said}",
    )
    return BY_ITSELF


def drain(bench: Bench) -> str:
    """Announce that a node is taken away in two minutes."""

    def strike(status: Status) -> bool:
        faults.drain(_elsewhere(status).node, NOTICE_S)
        return True

    bench.run(bench.named("drain"), Disturbance(PACE_S), strike)
    return BY_ITSELF


def torn(bench: Bench) -> str:
    """Cut the newest checkpoint's weights short, then SIGKILL a worker; the one before holds."""
    folder = RunFolder(bench.named("torn").folder)
    cut: list[str] = []

    def strike(status: Status) -> bool:
        complete = sorted(folder.checkpoints.glob("step-*/COMPLETE"))
        if len(complete) < 2:
            return False
        newest = complete[-1].parent
        faults.truncate(min(newest.glob("rank-*/weights.safetensors")))
        cut.append(newest.name)
        victim = status.beats[-1]
        _require(bench.strikers.kill(victim.node, victim.pid), f"process {victim.pid} lives on")
        return True

    bench.run(bench.named("torn"), Disturbance(PACE_S), strike)
    passed_over = [
        name
        for line in metrics_log.follow_files(folder.metrics)
        for name in line["values"].get("skipped", {})
    ]
    _require(cut[0] in passed_over, f"{cut[0]} was cut short, but the log does not say so")
    return BY_ITSELF


def hang(bench: Bench) -> str:
    """SIGSTOP a worker, so that the others wait in a collective; the error must name its rank."""
    victims: list[Beat] = []

    def strike(status: Status) -> bool:
        victims.append(status.beats[-1])
        held = bench.strikers.hold(victims[0].node, victims[0].pid)
        _require(held, f"process {victims[0].pid} does not stop")
        return True

    config = bench.named("hang", hang_after_s=HANG_S)
    _stopped(bench, config, Disturbance(PACE_S), strike, "hung: ")
    victim = victims[0]
    said = _said(config)
    named = f"rank {victim.rank} (pid {victim.pid}"
    _require(named in said, f"the error does not name rank {victim.rank}: {said}")
    _require(bench.strikers.gone(victim.node, victim.pid), f"process {victim.pid} lives on")
    bench.run(config, Disturbance(), None)
    return COMMAND


def nan(bench: Bench) -> str:
    """A batch of NaN on every worker; the error must name its rows."""
    config = bench.named("nan")
    _stopped(bench, config, Disturbance(nan_at=bench.at), None, "NaN or infinite")
    bench.run(config, Disturbance(), None)
    return COMMAND


def disk(bench: Bench) -> str:
    """No file may grow from a checkpoint on, as on a full disk."""
    config = bench.named("disk")
    _stopped(bench, config, Disturbance(full_disk_at=bench.at), None, "")
    bench.run(config, Disturbance(), None)
    return COMMAND


def shard(bench: Bench) -> str:
    """Another byte in a shard, met by workers that start again; the error must name the file."""
    if not bench.synthetic:
        raise SkippedError("shards that were given are not touched")
    path = sorted((bench.config.data.shards / "shards").glob("*.parquet"))[0]

    def strike(status: Status) -> bool:
        faults.flip(path)
        victim = status.beats[-1]
        _require(bench.strikers.kill(victim.node, victim.pid), f"process {victim.pid} lives on")
        return True

    config = bench.named("shard")
    try:
        _stopped(bench, config, Disturbance(PACE_S), strike, path.name)
    finally:
        faults.flip(path)
    bench.run(config, Disturbance(), None)
    return COMMAND


def driver(bench: Bench) -> str:
    """SIGKILL the command itself."""
    return _command(bench, "driver", signal.SIGKILL, -signal.SIGKILL)


def sigterm(bench: Bench) -> str:
    """SIGTERM to the command: a checkpoint, and exit code 143."""
    return _command(bench, "sigterm", signal.SIGTERM, 128 + signal.SIGTERM)


FAULTS: dict[str, Callable[[Bench], str]] = {
    "worker": worker,
    "torn": torn,
    "hang": hang,
    "nan": nan,
    "shard": shard,
    "disk": disk,
    "driver": driver,
    "sigterm": sigterm,
    # These take a node from the cluster, so they come last.
    "drain": drain,
    "node": node,
}


def run(
    config: RunConfig,
    names: Sequence[str],
    *,
    synthetic: bool,
    say: Callable[[str], None],
) -> list[Outcome]:
    """Train undisturbed, then once per fault; the caller has connected Ray.

    Args:
        config: A run that takes a minute or so, with its folder of runs.
        names: Of FAULTS.
        synthetic: Whether its shards may be altered and restored.
        say: Told of each fault as it is over.

    Raises:
        InputError: An unknown fault, or the undisturbed run fails.
    """
    unknown = sorted(set(names) - FAULTS.keys())
    if unknown:
        raise InputError(f"--faults {', '.join(unknown)}: choose of {', '.join(FAULTS)}")
    strikers = Strikers()
    try:
        bench = Bench(config, strikers, synthetic)
        undisturbed = bench.named("undisturbed")
        bench.run(undisturbed, Disturbance(), None)
        outcomes = []
        for name in (name for name in FAULTS if name in names):
            outcomes.append(_outcome(bench, name, RunFolder(undisturbed.folder)))
            say(line_of(outcomes[-1]))
    finally:
        strikers.close()
    return outcomes


def _outcome(bench: Bench, name: str, undisturbed: RunFolder) -> Outcome:
    folder = RunFolder(bench.named(name).folder)
    try:
        ended = FAULTS[name](bench)
    except SkippedError as reason:
        return Outcome(name, f"skipped: {reason}")
    attempts = len(list(folder.metrics.glob("attempt-*")))
    _require(attempts > 1, f"{name}: the workers were not started again")
    last = _recoveries(bench.named(name))[-1]
    return Outcome(
        name,
        ended,
        str(last["cause"]).replace(f"{folder.path.absolute().parents[1]}/", ""),
        attempts,
        last["replayed"],
        last["seconds"],
        difference(undisturbed, folder),
    )


def _stopped(
    bench: Bench,
    config: RunConfig,
    disturbance: Disturbance,
    strike: Callable[[Status], bool] | None,
    needle: str,
) -> None:
    """Train a run that must stop with an error that says `needle`, its checkpoint left whole."""
    from fusion.training.checkpoint import newest_complete

    try:
        bench.run(config, disturbance, strike)
    except InputError as error:
        _require(needle in str(error), f"{config.name} stopped, but not over {needle!r}: {error}")
    else:
        raise SkippedError(f"the run ended before step {bench.at}: let it train longer")
    held = newest_complete(RunFolder(config.folder).checkpoints)
    _require(held.path is not None, f"{config.name}: no whole checkpoint is left")


def _command(bench: Bench, fault: str, number: int, code: int) -> str:
    """Signal a `rayfuse train` of its own, then give the same command."""
    import ray

    config = bench.named(fault)
    folder = RunFolder(config.folder)
    file = config.runs_dir / f"{config.name}.yaml"
    run_config.dump(config, file)
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    if "RAY_AUTH_TOKEN_PATH" in environment:
        environment["RAY_AUTH_MODE"] = "token"
    command = [sys.executable, "-m", "ray_jobs", "train", str(file)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + START_S
        while _steps(folder) < bench.at and process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
                raise SkippedError(f"`rayfuse train` took no step in {START_S:.0f} s")
            time.sleep(0.02)
        os.kill(process.pid, number)
        ended = process.wait(START_S)
    if folder.outcome.is_file():
        raise SkippedError(f"the run ended before step {bench.at}: let it train longer")
    _require(ended == code, f"{fault}: exit code {ended}, not {code}")
    bench.run(config, Disturbance(), None)
    return COMMAND


def _steps(folder: RunFolder) -> int:
    """Steps in a run's log and checkpoints so far."""
    lines = metrics_log.read(folder.metrics)
    return max((line["step"] for line in lines), default=0)


def _recoveries(config: RunConfig) -> list[dict[str, Any]]:
    """What the run's log says of each loss."""
    found = [
        line["values"]
        for line in metrics_log.follow_files(RunFolder(config.folder).metrics)
        if line["values"].get("event") == "recovered"
    ]
    _require(bool(found), f"{config.name}: no line in the log says what was lost")
    return found


def _said(config: RunConfig) -> str:
    """Why the run's last command stopped."""
    from ray_jobs import recovery

    found = recovery.before(RunFolder(config.folder))
    return found[0] if found else ""


def _elsewhere(status: Status) -> Beat:
    """A worker on another node than the driver's."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    found = [beat for beat in status.beats if beat.node != here]
    if not found:
        raise SkippedError("no worker is on another node than the driver")
    return found[-1]


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise InputError(f"chaos: {otherwise}")
