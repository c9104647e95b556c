"""Whose run a folder is, and what it was made from and on: hashes, versions, machine.

env.json holds no host name, user or path.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import platform
import subprocess
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import InputError
from data.files import sha256_json, write_json
from ray_jobs import config as run_config
from ray_jobs import mirror
from ray_jobs.inference import load_config
from ray_jobs.runs import RunFolder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from data.manifest import Manifest
    from ray_jobs.config import RunConfig

PACKAGES = ("ray", "torch", "torchvision", "numpy", "pyarrow", "polars", "scikit-learn")
# Where a run lives and how wide it runs do not change what it computes.
_FREE = (
    "name",
    "note",
    "runs_dir",
    "storage_path",
    "scaling",
    "checkpoint",
    "evaluate",
    "train.cache_embeddings",
    "data.shards",
    "data.sources",
    "data.extract",
    "data.allow_mixed",
    "data.batches.processes",
    "data.batches.cache_dir",
)


def code_version() -> str:
    """`git describe` of the source tree, else the installed package's version."""
    root = Path(__file__).parents[1]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            pass
        else:
            return done.stdout.strip()
    return metadata.version("rayfuse")


def environment() -> dict[str, Any]:
    """Versions and machine of this process."""
    import psutil
    import torch

    return {
        "code_version": code_version(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def lineage(config: RunConfig, manifest: Manifest) -> dict[str, Any]:
    """The hashes that say whether two runs are the same experiment."""
    return {
        "config": sha256_json(computed(config)),
        "manifest": manifest.digest,
        "release": manifest.release,
        "preset": config.preset,
        "shards_preset": manifest.preset,
    }


def computed(config: RunConfig) -> dict[str, Any]:
    """The dotted paths of a config that decide what a run computes, with their values."""
    flat = _flatten(config.model_dump(mode="json"))
    return {path: value for path, value in flat.items() if not is_free(path)}


def is_free(path: str) -> bool:
    """Whether a dotted path may change between the starts of a run."""
    return any(path == free or path.startswith(free + ".") for free in _FREE)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Where two configs compute something else, one readable line each."""
    before, after = computed(old), computed(new)
    return [
        f"{path}: {before.get(path)!r} -> {after.get(path)!r}"
        for path in sorted(before | after)
        if before.get(path) != after.get(path)
    ]


def check_shards(config: RunConfig, manifest: Manifest) -> None:
    """Refuse shards of another task, or of another preset unless `data.allow_mixed` is set.

    Raises:
        InputError: They do not fit the run.
    """
    if manifest.task != config.task:
        raise InputError(
            f"data.shards: {config.data.shards} holds the task {manifest.task!r}, but the run is "
            f"of {config.task!r}; set task, or extract shards for it"
        )
    if manifest.preset != config.preset and not config.data.allow_mixed:
        raise InputError(
            f"data.shards: {config.data.shards} was extracted with preset {manifest.preset!r}, but "
            f"the run has {config.preset!r}; extract again, or set data.allow_mixed=true"
        )


def claim(config: RunConfig, manifest: Manifest, *, fork: bool) -> RunConfig:
    """Take the run's folder, new or its own; note this start in its env.json.

    Args:
        config: The run.
        manifest: Of its shards.
        fork: Where the name belongs to another config, take the first of <name>-2, <name>-3, ...
            that is free or already this config's.

    Returns:
        The config, under the name that was taken.

    Raises:
        InputError: The name belongs to another config or to other shards, and fork is False.
    """
    names = (f"{config.name}-{number}" for number in itertools.count(2))
    for name in itertools.chain([config.name], names):
        taken = config.model_copy(update={"name": name})
        folder = RunFolder(taken.folder)
        mirror.identify(taken)
        faults = _faults(folder, taken, manifest)
        if not faults:
            break
        if not fork:
            listed = "\n".join(f"  {fault}" for fault in faults)
            raise InputError(
                f"{folder.path} is the run of another config:\n{listed}\n"
                "choose another name, or --fork to take the next free one"
            )
    # Predictions and metrics of patients come here: for this user alone.
    folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    starts = _environment(folder).get("starts", [])
    if not folder.config.exists():
        run_config.dump(taken, folder.config)
    started = {**environment(), "time": time.time(), "workers": taken.scaling.most}
    write_json(
        folder.environment, {"lineage": lineage(taken, manifest), "starts": [*starts, started]}
    )
    return taken


@contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Keep a second process from training the same run.

    Raises:
        InputError: One is training it.
    """
    with (folder.path / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder.path} is being trained by another process; wait for it, or end it"
            ) from None
        yield


def _faults(folder: RunFolder, config: RunConfig, manifest: Manifest) -> list[str]:
    if not folder.config.exists():
        return []
    faults = differences(load_config(folder.path), config)
    before = _environment(folder).get("lineage", {}).get("manifest", manifest.digest)
    if before != manifest.digest:
        faults.append(f"shards: manifest {before[:12]} -> {manifest.digest[:12]}")
    return faults


def _environment(folder: RunFolder) -> dict[str, Any]:
    if not folder.environment.exists():
        return {}
    value: dict[str, Any] = json.loads(folder.environment.read_text(encoding="utf-8"))
    return value


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or (prefix and not value):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else key)
    return flat
