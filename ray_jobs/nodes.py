"""`rayfuse doctor --cluster`: do the nodes agree, and can each do what a run needs of it?"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from data.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray_jobs.config import RunConfig
    from ray_jobs.doctor import Line

PACKAGES = ("rayfuse", "ray", "torch", "deepspeed")
ANSWER_S = 120.0
MAX_CLOCK_S = 1.0
MIN_FREE_GB = 5.0
_SAMPLED = 2**20


@dataclass
class Node:
    """What one node says of itself; `fault` where it cannot."""

    name: str
    versions: dict[str, str] = field(default_factory=dict)
    clock: tuple[float, float] = (0.0, 0.0)
    """Its clock less ours, and how far that may be off, in seconds."""
    gpus: list[str] = field(default_factory=list)
    gpus_offered: int = 0
    nccl: str = ""
    free_gb: dict[str, float] = field(default_factory=dict)
    weights: dict[str, str | None] = field(default_factory=dict)
    """What `init_from` names -> a digest of its size, head and tail; None if it is not there."""
    written: str | None = None
    """Why it could not write to the shared storage; None if it could."""
    sees: int = 0
    fault: str | None = None


def examine(run_yaml: Path | None, address: str | None = None) -> tuple[list[str], bool]:
    """Ask every node of the cluster at `address`.

    Args:
        run_yaml: Whose storage and base weights are looked for; without it neither is.
        address: Of the cluster, as in `rayfuse train`; default RAY_ADDRESS.

    Returns:
        One text line for each check, and whether all is well.

    Raises:
        InputError: No cluster is named, or it does not answer.
    """
    from ray_jobs import cluster, doctor
    from ray_jobs import config as run_config

    if not address and not os.environ.get("RAY_ADDRESS"):
        raise InputError(
            "doctor --cluster: no cluster is named; on its head add --address auto, from elsewhere "
            "send it there: `rayfuse submit doctor --cluster RUN.yaml`"
        )
    runs = run_config.load(run_yaml) if run_yaml else []
    with cluster.connect(address):
        return doctor.text_lines(list(judge(survey(runs))))


def survey(runs: list[RunConfig]) -> list[Node]:
    """One small actor on each node, pinned to it; all look at once."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    weights = sorted({str(file.absolute()) for run in runs for file in _weights(run)})
    storage = sorted({str(run.folder.parent.absolute()) for run in runs})
    probe = ray.remote(num_cpus=0, max_restarts=0)(Probe)
    alive = [node for node in ray.nodes() if node["Alive"]]
    actors = {
        node["NodeID"]: probe.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in alive
    }
    mark = f".doctor-{uuid4().hex}"
    nodes = []
    for entry in alive:
        found = Node(f"{entry['NodeManagerAddress']} {entry['NodeID'][:6]}")
        found.gpus_offered = int(entry["Resources"].get("GPU", 0))
        nodes.append(found)
    _ask(actors, nodes, "look", weights, storage, found=_fill)
    _ask(actors, nodes, "clock", found=_set_clock)
    _ask(actors, nodes, "write", storage, mark, found=_set_written)
    _ask(actors, nodes, "see", storage, mark, found=_set_seen)
    _ask(actors, nodes, "clear", storage, mark, found=lambda node, answer, sent: None)
    for actor in actors.values():
        ray.kill(actor)
    return nodes


def judge(nodes: list[Node]) -> Iterator[Line]:
    """One line for each thing that must hold, naming the nodes where it does not."""
    answering = [node for node in nodes if node.fault is None]
    for node in nodes:
        if node.fault is not None:
            yield ("FAIL", "node", f"{node.name}: {node.fault}")
    yield ("ok", "nodes", f"{len(answering)} of {len(nodes)} answer")
    if not answering:
        return
    for package in ("python", *PACKAGES):
        yield _agreement(package, {node.name: node.versions[package] for node in answering})
    yield _clocks(answering)
    for node in answering:
        yield _gpus(node)
        yield from _disk(node)
    yield from _base_weights(answering)
    yield from _storage(answering)


class Probe:
    """Lives on one node; each method is one question."""

    def look(self, weights: list[str], storage: list[str]) -> dict[str, Any]:
        """Versions, GPUs, NCCL, free disk, digests of the base weights."""
        import platform
        import shutil
        from importlib import metadata

        from ray_jobs import package

        versions = {name: metadata.version(name) for name in PACKAGES}
        versions["rayfuse"] = f"{versions['rayfuse']} ({package.code_digest()})"
        gpus, nccl = _visible_gpus()
        places = {"/tmp": Path("/tmp"), **{place: _nearest(place) for place in storage}}
        return {
            "versions": {"python": platform.python_version(), **versions},
            "gpus": gpus,
            "nccl": nccl,
            "free_gb": {
                place: shutil.disk_usage(folder).free / 2**30 for place, folder in places.items()
            },
            "weights": {file: _digest(Path(file)) for file in weights},
        }

    def clock(self) -> float:
        """This node's time."""
        return time.time()

    def write(self, storage: list[str], mark: str) -> str | None:
        """Leave a mark on the shared storage; why not, if that fails."""
        import ray

        for place in storage:
            folder = Path(place) / mark
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                (folder / ray.get_runtime_context().get_node_id()).write_bytes(b"x" * 4096)
            except OSError as error:
                return f"{place}: {error.strerror}"
        return None

    def see(self, storage: list[str], mark: str) -> int:
        """How many nodes' marks are visible from here, where fewest are."""
        counts = [len(list((Path(place) / mark).glob("*"))) for place in storage]
        return min(counts, default=0)

    def clear(self, storage: list[str], mark: str) -> None:
        """Remove the marks."""
        import shutil

        for place in storage:
            shutil.rmtree(Path(place) / mark, ignore_errors=True)


def _ask(actors: dict[str, Any], nodes: list[Node], method: str, *values: Any, found: Any) -> None:
    """Put one question to all nodes at once; who cannot answer is not asked again."""
    import ray

    asked = []
    for node, actor in zip(nodes, actors.values(), strict=True):
        if node.fault is None:
            asked.append((node, time.time(), getattr(actor, method).remote(*values)))
    deadline = time.monotonic() + ANSWER_S
    for node, sent, answer in asked:
        try:
            left = max(0.1, deadline - time.monotonic())
            found(node, ray.get(answer, timeout=left), (sent, time.time()))
        except ray.exceptions.GetTimeoutError:
            node.fault = f"no answer to {method} within {ANSWER_S:g} s"
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            node.fault = f"{method}: {type(cause).__name__}: {str(cause).splitlines()[0]}"


def _fill(node: Node, answer: dict[str, Any], sent: tuple[float, float]) -> None:
    for name, value in answer.items():
        setattr(node, name, value)


def _set_clock(node: Node, answer: float, sent: tuple[float, float]) -> None:
    asked, heard = sent
    node.clock = (answer - (asked + heard) / 2, (heard - asked) / 2)


def _set_written(node: Node, answer: str | None, sent: tuple[float, float]) -> None:
    node.written = answer


def _set_seen(node: Node, answer: int, sent: tuple[float, float]) -> None:
    node.sees = answer


def _weights(run: RunConfig) -> list[Path]:
    image_weights = getattr(run.model, "image_weights", None)
    embeddings = getattr(run.model, "embeddings", None)
    served = None if embeddings is None else Path(embeddings) / "served.json"
    files = [*run.init_from.values(), image_weights, served]
    return [Path(file) for file in files if file is not None]


def _visible_gpus() -> tuple[list[str], str]:
    if not Path("/proc/driver/nvidia").exists() and not Path("/dev/nvidia0").exists():
        return [], ""
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    version = torch.cuda.nccl.version() if names else ()  # type: ignore[no-untyped-call]
    return names, ".".join(map(str, version))


def _nearest(place: str) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = Path(place)
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def _digest(source: Path) -> str | None:
    """Size, head and tail of a file, or of a run's best weights: 26 GB are not read for this."""
    best = sorted(path for path in (source / "best").rglob("*") if path.is_file())
    files = best if source.is_dir() else [source]
    if not files or not all(file.is_file() for file in files):
        return None
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(_SAMPLED))
            handle.seek(max(0, size - _SAMPLED))
            digest.update(handle.read(_SAMPLED))
    return digest.hexdigest()[:12]


def _agreement(what: str, values: dict[str, str]) -> Line:
    kinds: dict[str, list[str]] = {}
    for node, value in values.items():
        kinds.setdefault(value, []).append(node)
    if len(kinds) == 1:
        return ("ok", what, next(iter(kinds)))
    listed = "; ".join(f"{value} on {', '.join(where)}" for value, where in sorted(kinds.items()))
    return ("FAIL", what, f"{listed}: install the same everywhere")


def _clocks(nodes: list[Node]) -> Line:
    off = [node for node in nodes if abs(node.clock[0]) - node.clock[1] > MAX_CLOCK_S]
    if off:
        listed = ", ".join(f"{node.name} by {node.clock[0]:+.1f} s" for node in off)
        return ("FAIL", "clocks", f"{listed}: set them by NTP")
    return ("ok", "clocks", f"within {MAX_CLOCK_S:g} s of this one")


def _gpus(node: Node) -> Line:
    if node.gpus_offered > len(node.gpus):
        return (
            "FAIL",
            "gpus",
            f"{node.name}: offers {node.gpus_offered}, but torch sees {len(node.gpus)}: "
            "check the driver",
        )
    if not node.gpus:
        return ("note", "gpus", f"{node.name}: none")
    return ("ok", "gpus", f"{node.name}: {len(node.gpus)} x {node.gpus[0]}, NCCL {node.nccl}")


def _disk(node: Node) -> Iterator[Line]:
    for place, free in node.free_gb.items():
        yield (
            "ok" if free >= MIN_FREE_GB else "FAIL",
            "disk",
            f"{node.name}: {free:.1f} GB free at {place} (at least {MIN_FREE_GB:.0f})",
        )


def _base_weights(nodes: list[Node]) -> Iterator[Line]:
    for file in nodes[0].weights:
        lacking = [node.name for node in nodes if node.weights[file] is None]
        if lacking:
            yield ("FAIL", "weights", f"{file} is missing on {', '.join(lacking)}")
        elif len({node.weights[file] for node in nodes}) > 1:
            yield ("FAIL", "weights", f"{file} differs between nodes: copy it again")
        else:
            yield ("ok", "weights", f"{file} on every node")


def _storage(nodes: list[Node]) -> Iterator[Line]:
    places = [place for place in nodes[0].free_gb if place != "/tmp"]
    if not places:
        yield ("note", "storage", "name a run's YAML to check its runs_dir from every node")
        return
    where = ", ".join(places)
    unwritten = [f"{node.name} ({node.written})" for node in nodes if node.written is not None]
    if unwritten:
        yield ("FAIL", "storage", f"not writable from {', '.join(unwritten)}")
        return
    blind = [node.name for node in nodes if node.sees < len(nodes)]
    if blind:
        yield ("FAIL", "storage", f"{where} is not one folder to {', '.join(blind)}: share it")
        return
    yield ("ok", "storage", f"{where}: written and seen by every node")
