"""`rayfuse doctor`: could a run start here? One line for each thing looked at."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray_jobs.config import RunConfig

Verdict = Literal["ok", "note", "FAIL"]
Line = tuple[Verdict, str, str]

MIN_FREE_GB = 2.0
MIN_MEMORY_GB = 4.0
RAY_PORTS = {6379: "GCS", 8265: "dashboard", 10001: "client"}
WHERE = {
    "mimic_iv": "MIMIC-IV: physionet.org/content/mimiciv (credentialed)",
    "mimic_iii": "MIMIC-III: physionet.org/content/mimiciii (credentialed)",
    "mimic_cxr": "MIMIC-CXR-JPG: physionet.org/content/mimic-cxr-jpg (credentialed)",
    "notes": "MIMIC-IV-Note: physionet.org/content/mimic-iv-note (credentialed)",
}


def examine(config: Path | None = None) -> tuple[list[str], bool]:
    """What this machine has, and with a run's YAML which of its inputs are there.

    Returns:
        One text line for each check, and whether a run could start.
    """
    lines = [*_python(), *_machine(), *_torch(), *_ray()]
    if config is not None:
        lines += _inputs(config)
    return text_lines(lines)


def text_lines(lines: list[Line]) -> tuple[list[str], bool]:
    """The lines as text, and whether none of them failed."""
    texts = [f"{verdict:<4}  {name:<10}  {detail}" for verdict, name, detail in lines]
    return texts, all(verdict != "FAIL" for verdict, _, _ in lines)


def _python() -> Iterator[Line]:
    good = (3, 11) <= sys.version_info[:2] < (3, 14)
    yield ("ok" if good else "FAIL", "python", f"{platform.python_version()} (3.11 to 3.13)")


def _machine() -> Iterator[Line]:
    import psutil

    free = shutil.disk_usage(Path.cwd()).free / 2**30
    yield (
        "ok" if free >= MIN_FREE_GB else "FAIL",
        "disk",
        f"{free:.1f} GB free here (at least {MIN_FREE_GB:.0f}; `rayfuse data plan` says how much)",
    )
    memory = psutil.virtual_memory()
    available = memory.available / 2**30
    yield (
        "ok" if available >= MIN_MEMORY_GB else "FAIL",
        "memory",
        f"{available:.1f} of {memory.total / 2**30:.1f} GB available "
        f"(at least {MIN_MEMORY_GB:.0f})",
    )
    yield ("ok", "cpu", f"{os.cpu_count()} cores")


def _torch() -> Iterator[Line]:
    import torch

    yield ("ok", "torch", f"{torch.__version__}, built for CUDA {torch.version.cuda}")
    if not torch.cuda.is_available():
        yield ("note", "gpu", "none: runs use the CPU (scaling.use_gpu=false)")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        yield ("ok", f"gpu {index}", f"{properties.name}, {memory:.0f} GB")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    yield ("ok", "nccl", nccl)


def _ray() -> Iterator[Line]:
    yield ("ok", "ray", importlib.metadata.version("ray"))
    address = os.environ.get("RAY_ADDRESS")
    if address:
        yield ("note", "cluster", f"RAY_ADDRESS={address}: runs go there, not to a local instance")
    for port, use in RAY_PORTS.items():
        with socket.socket() as probe:
            probe.settimeout(0.2)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                yield ("note", "port", f"{port} ({use}) is in use: another Ray runs here")
    shm = Path("/dev/shm")
    if shm.is_dir():
        free = shutil.disk_usage(shm).free / 2**30
        yield (
            "ok" if free >= 1 else "note",
            "/dev/shm",
            f"{free:.1f} GB free (Ray's object store; below 1 GB it falls back to disk)",
        )


def _inputs(path: Path) -> Iterator[Line]:
    from ray_jobs import config as run_config

    try:
        runs = run_config.load(path)
    except InputError as error:
        yield ("FAIL", "config", str(error))
        return
    yield ("ok", "config", f"{path}: {len(runs)} run(s): {', '.join(run.name for run in runs)}")
    for run in runs:
        yield from _run_inputs(run, made={str(other.folder) for other in runs})


def _storage(run: RunConfig) -> Line:
    from ray_jobs import storage

    place = run.storage_path if storage.in_bucket(run.storage_path) else run.folder.parent
    try:
        storage.check(run)
    except InputError as error:
        return ("FAIL", "storage", f"{run.name}: {error}")
    return ("ok", "storage", f"{run.name}: {place} can be written")


def _run_inputs(run: RunConfig, *, made: set[str]) -> Iterator[Line]:
    from data.manifest import FILE_NAME

    yield _storage(run)
    sources = [(name, folder) for name, folder in run.data.sources if folder is not None]
    if (run.data.shards / FILE_NAME).is_file():
        yield ("ok", "shards", f"{run.name}: {run.data.shards}")
    elif sources:
        yield ("note", "shards", f"{run.name}: {run.data.shards} will be extracted")
        for name, folder in sources:
            found = folder.is_dir()
            detail = str(folder) if found else f"{folder} is missing; {WHERE[name]}"
            yield ("ok" if found else "FAIL", name, f"{run.name}: {detail}")
    else:
        yield (
            "FAIL",
            "shards",
            f"{run.name}: {run.data.shards} has no manifest and data.sources names no tables; "
            "run `rayfuse data extract` first (or `rayfuse data synth` to try without data)",
        )
    for prefix, weights in run.init_from.items():
        found = weights.exists() or str(weights) in made
        detail = str(weights) if found else f"{weights} is missing; train that run first"
        yield ("ok" if found else "FAIL", "init_from", f"{run.name}: {prefix} from {detail}")
    image_weights = getattr(run.model, "image_weights", None)
    if image_weights is not None:
        found = Path(image_weights).is_file()
        yield ("ok" if found else "FAIL", "weights", f"{run.name}: {image_weights}")
    embeddings = getattr(run.model, "embeddings", None)
    if embeddings is not None:
        from fusion.encoders.text_store import SERVED

        found = (embeddings / SERVED).is_file()
        hint = "" if found else " is missing; `rayfuse data embed` fills it"
        yield ("ok" if found else "FAIL", "embeddings", f"{run.name}: {embeddings}{hint}")
