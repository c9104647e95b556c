"""The same run on Kubernetes and on Slurm: what `rayfuse submit --target` writes.

Numbers of nodes, GPUs and cores come from the runs' `scaling`; both start Ray with a token.
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from importlib import metadata
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field

from data.config import Config
from data.errors import InputError
from ray_jobs import jobs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ray_jobs.config import RunConfig
    from ray_jobs.submit import Command

_MOUNTED = "/etc/rayfuse"
_TOKEN_FOLDER = "/var/run/rayfuse"
_NAME_LENGTH = 40


class Kubernetes(Config):
    """What a RayJob needs beyond the run; KubeRay 1.6 or later."""

    image: str
    """The image that the Dockerfile makes, with its registry."""
    claim: str
    """The PersistentVolumeClaim (ReadWriteMany) of the shared storage."""
    mount: Path = Path("/mnt/rayfuse")
    """Where it is mounted; every path of the run lies below."""
    secret: str = "rayfuse-token"
    """The Secret whose key auth_token holds the cluster's token."""
    per_node: int | None = Field(default=None, ge=1)
    """Workers in a pod; default: at most 8, evenly."""
    memory: str = "64Gi"
    """Of each worker pod."""
    shared_memory: str = "16Gi"
    """Of /dev/shm, where Ray keeps objects."""
    user: int = 1000
    """Numeric user and group of the image, which must be able to write to the storage."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Further variables of every pod, e.g. NCCL_IB_HCA."""


class Slurm(Config):
    """What an sbatch script needs beyond the run."""

    time: str = Field(default="24:00:00", pattern=r"^(\d+-)?\d{1,2}(:\d{2}){0,2}$")
    """Limit of one allocation; the run goes on in the next."""
    warn_s: int = Field(default=300, ge=30)
    """Seconds before the limit at which the run writes its checkpoint."""
    per_node: int | None = Field(default=None, ge=1)
    """Workers on a node; default: at most 8, evenly."""
    memory: str | None = None
    partition: str | None = None
    account: str | None = None
    python: Path = Path(sys.prefix)
    """The virtual environment, on storage that all nodes share."""
    setup: str = ""
    """Shell line run first, e.g. `module load cuda`."""


@dataclass(frozen=True)
class Layout:
    """Nodes (fewest and most) and what each holds."""

    least: int
    most: int
    cpus: int
    gpus: int


def layout(runs: Iterable[RunConfig], per_node: int | None) -> Layout:
    """The nodes that hold the widest of the runs."""
    parts = []
    for run in runs:
        scaling = run.scaling
        each = scaling.resources_per_worker
        most = ceil(scaling.most / (per_node or 8))
        workers = per_node or ceil(scaling.most / most)
        gpus = each.get("GPU", 1.0 if scaling.use_gpu else 0.0)
        cpus = max(each.get("CPU", 1.0), 1.0 + run.data.batches.processes)
        parts.append(
            (
                ceil(scaling.least / workers),
                most,
                ceil(cpus * workers),
                ceil(gpus * workers),
            )
        )
    return Layout(*(max(column) for column in zip(*parts, strict=True)))


def kubernetes(command: Command, options: Kubernetes) -> str:
    """A ConfigMap with the run's YAML and the RayJob that trains it.

    Raises:
        InputError: A path of a run does not lie on the claim, or the command trains nothing.
    """
    _needs_runs(command)
    for run in command.runs:
        _below_mount(run, options.mount)
    name = _kubernetes_name(command.name)
    sizes = layout(command.runs, options.per_node)
    words = [f"{_MOUNTED}/{word}" if word in command.texts else word for word in command.words]
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": dict(command.texts),
    }
    worker = {"cpu": str(sizes.cpus), "memory": options.memory}
    if sizes.gpus:
        worker["nvidia.com/gpu"] = str(sizes.gpus)
    cluster = {
        "rayVersion": metadata.version("ray"),
        # Tells the operator, which asks the dashboard how the job stands.
        "authOptions": {"mode": "token", "secretName": options.secret},
        "headGroupSpec": {
            # The driver runs here; workers do not.
            "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},
            "template": _pod("ray-head", {"cpu": "2", "memory": "8Gi"}, options, config_map=name),
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": sizes.most,
                "minReplicas": sizes.least,
                "maxReplicas": sizes.most,
                "rayStartParams": {},
                "template": _pod("ray-worker", worker, options),
            }
        ],
    }
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": "exec python -m ray_jobs " + shlex.join(words),
            "runtimeEnvYAML": yaml.safe_dump({"env_vars": jobs.STOP_GRACE}),
            "metadata": {jobs.RUNS: ",".join(run.name for run in command.runs)},
            # A lost head takes the cluster with it; the next one continues the run.
            "backoffLimit": max(run.scaling.max_failures for run in command.runs),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": cluster,
        },
    }
    head = (
        f"# {command.name} on Kubernetes: kubectl apply -f this file\n"
        "# Once: openssl rand -hex 32 | tr -d '\\n' > token && kubectl create secret generic "
        f"{options.secret} --from-file=auth_token=token && rm token\n"
    )
    return head + yaml.dump_all([config_map, job], Dumper=_Readable, sort_keys=False)


def slurm(command: Command, options: Slurm) -> str:
    """An sbatch script: Ray on the allocation, the run on Ray, a checkpoint before the limit.

    Raises:
        InputError: The command trains nothing.
    """
    _needs_runs(command)
    sizes = layout(command.runs, options.per_node)
    nodes = str(sizes.most) if sizes.least == sizes.most else f"{sizes.least}-{sizes.most}"
    asked = {
        "job-name": f"rayfuse-{command.name}",
        "nodes": nodes,
        "ntasks-per-node": "1",
        "cpus-per-task": str(sizes.cpus),
        "gpus-per-node": str(sizes.gpus) if sizes.gpus else None,
        "mem": options.memory,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "signal": f"B:USR1@{options.warn_s}",
        "output": f"rayfuse-{command.name}-%j.log",
    }
    directives = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    # Ray's symmetric-run wants a node without another Ray, and stops all of the user's at the end.
    directives += ["--exclusive", "--requeue", "--open-mode=append"]
    words = [f'"$state"/{word}' if word in command.texts else shlex.quote(word)
             for word in command.words]  # fmt: skip
    folders = [str(run.folder) for run in command.runs]
    values = {
        "directives": "\n".join(f"#SBATCH {line}" for line in directives),
        "setup": options.setup,
        "python": shlex.quote(str(options.python)),
        "state": shlex.quote(str(command.runs[-1].runs_dir / ".slurm")),
        "folders": " ".join(shlex.quote(folder) for folder in folders),
        "cpus": str(sizes.cpus),
        "gpus": str(sizes.gpus),
        "words": " ".join(words),
        "files": "\n".join(_here_document(name, text) for name, text in command.texts.items()),
    }
    template = (Path(__file__).parent / "templates" / "slurm.sbatch").read_text(encoding="utf-8")
    return re.sub(r"@(\w+)@", lambda found: values[found[1]], template)


def _needs_runs(command: Command) -> None:
    if not command.runs:
        raise InputError(
            f"submit {command.words[0]}: only a command with a run's YAML says how many nodes it "
            "needs; send this one to a running cluster, without --target"
        )


def _below_mount(run: RunConfig, mount: Path) -> None:
    from ray_jobs.submit import paths_of

    for key, path in paths_of(run):
        if path.is_absolute() and not path.is_relative_to(mount):
            raise InputError(
                f"{key}: {path} is not on the shared storage, which pods see at {mount}; move it "
                f"there, or set -o mount"
            )


def _pod(
    name: str, resources: dict[str, str], options: Kubernetes, *, config_map: str | None = None
) -> dict[str, Any]:
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": f"{_TOKEN_FOLDER}/auth_token",
        "RAY_USAGE_STATS_ENABLED": "0",
        **options.environment,
    }
    volumes: dict[str, tuple[str, bool, dict[str, Any]]] = {
        "token": (
            _TOKEN_FOLDER,
            True,
            {"secret": {"secretName": options.secret, "defaultMode": 0o440}},
        ),
        "storage": (
            str(options.mount),
            False,
            {"persistentVolumeClaim": {"claimName": options.claim}},
        ),
        "shared-memory": (
            "/dev/shm",
            False,
            {"emptyDir": {"medium": "Memory", "sizeLimit": options.shared_memory}},
        ),
    }
    if config_map is not None:
        volumes["run"] = (_MOUNTED, True, {"configMap": {"name": config_map}})
    container = {
        "name": name,
        "image": options.image,
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "volumeMounts": [
            {"name": key, "mountPath": path, "readOnly": read_only}
            for key, (path, read_only, _) in volumes.items()
        ],
    }
    return {
        "spec": {
            "securityContext": {
                "runAsUser": options.user,
                "runAsGroup": options.user,
                # Makes the token readable for that user; large volumes are not walked again.
                "fsGroup": options.user,
                "fsGroupChangePolicy": "OnRootMismatch",
            },
            "containers": [container],
            "volumes": [{"name": key, **source} for key, (_, _, source) in volumes.items()],
        }
    }


def _kubernetes_name(name: str) -> str:
    """Lower case, digits and hyphens, short enough for the names that KubeRay derives."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"rayfuse-{plain}"[:_NAME_LENGTH].rstrip("-")


class _Readable(yaml.SafeDumper):
    """Texts of several lines as they are."""


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Readable.add_representer(str, _represent)


def _here_document(name: str, text: str) -> str:
    end = "END_OF_FILE"
    while f"\n{end}\n" in f"\n{text}":
        end += "_"
    return f"cat > \"$state\"/{name} <<'{end}'\n{text.rstrip()}\n{end}"
