"""`rayfuse submit`: a rayfuse command, made fit to run elsewhere, and sent as a Ray job."""

from __future__ import annotations

import itertools
import logging
import re
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from data.errors import InputError
from data.files import write_text
from ray_jobs import config as run_config
from ray_jobs import jobs, package

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray.job_submission import JobSubmissionClient

    from ray_jobs.config import RunConfig

logger = logging.getLogger(__name__)

CONFIG_NAME = "run.yaml"
_URL = re.compile(r"^[a-z][a-z0-9+]+:/")


@dataclass(frozen=True)
class Command:
    """A rayfuse command whose paths are those of the cluster's shared storage.

    Args:
        words: What follows `rayfuse`.
        runs: The runs that it trains or looks at; none where it takes no run's YAML.
        texts: Files that it reads, by name in its working directory.
    """

    words: tuple[str, ...]
    runs: tuple[RunConfig, ...]
    texts: dict[str, str]

    @property
    def name(self) -> str:
        """The last run's name, or the verb."""
        return self.runs[-1].name if self.runs else self.words[0]

    @property
    def entrypoint(self) -> str:
        """The shell line that a node runs; `exec` makes the driver hear the job's signals."""
        return "exec python -m ray_jobs " + shlex.join(self.words)


def prepare(root: Any, words: list[str], storage: Path | None) -> Command:
    """Check a command here, before anything is sent, and make its paths the cluster's.

    A run's YAML is read here with its overrides; what is sent is the resolved config.

    Args:
        root: The command line's root group.
        words: The verb and what follows it.
        storage: Folder of the cluster's shared storage below which relative paths lie.

    Raises:
        InputError: An unknown verb, a wrong config, or a relative path without `storage`.
    """
    command, verb, rest = _resolve(root, words)
    parsed = command.make_context(" ".join(verb), list(rest))
    values = parsed.params
    config = values.get("config")
    if not isinstance(config, Path):
        return Command((*verb, *_rebased(rest, _paths(values), storage)), (), {})
    overrides = values.get("overrides") or []
    runs = [_on_storage(run, storage) for run in run_config.load(config, overrides)]
    kept = list(rest)
    for word in [str(config), *overrides]:
        # Typed as ./run.yaml or run.yaml, a path is one and the same.
        kept.remove(next(each for each in kept if each == word or Path(each) == Path(word)))
    others = _paths({name: value for name, value in values.items() if name != "config"})
    kept = _rebased(kept, others, storage)
    stages = [run.model_dump(mode="json") for run in runs]
    document = stages[0] if len(stages) == 1 else {"stages": stages}
    text = yaml.safe_dump(document, sort_keys=False)
    return Command((*verb, CONFIG_NAME, *kept), tuple(runs), {CONFIG_NAME: text})


def send(command: Command, client: JobSubmissionClient, *, code: bool = True) -> str:
    """Upload the working directory and start the job.

    Returns:
        The job's id: the run's name, @ and a number.

    Raises:
        InputError: A job of one of its runs has not ended, or the package is refused.
    """
    known = jobs.submitted(client)
    names = [run.name for run in command.runs] or [command.name]
    for job in known:
        same = set(names) & set(jobs.run_names(job)) if command.runs else set()
        if same and not job.status.is_terminal():
            raise InputError(
                f"{same.pop()} is running already as {job.submission_id}; see `rayfuse runs logs "
                f"{job.submission_id}`, or end it with `rayfuse runs stop {job.submission_id}`"
            )
    taken = {job.submission_id for job in known}
    free = (f"{command.name}@{number}" for number in itertools.count(1))
    name = next(each for each in free if each not in taken)
    with tempfile.TemporaryDirectory(prefix="rf-") as folder:
        archive = Path(folder) / "working_dir.zip"
        built = package.build(archive, command.texts, code=code, secret=jobs.token())
        logger.info("working directory: %s", built)
        return str(
            client.submit_job(
                entrypoint=command.entrypoint,
                submission_id=name,
                runtime_env={"working_dir": str(archive), "env_vars": dict(jobs.STOP_GRACE)},
                metadata={jobs.RUNS: ",".join(names)},
            )
        )


def describe(command: Command, *, code: bool = True) -> str:
    """What `send` would send: the entrypoint, the package's size, the files it reads."""
    with tempfile.TemporaryDirectory(prefix="rf-") as folder:
        built = package.build(Path(folder) / "working_dir.zip", command.texts, code=code)
    files = [f"--- {name}\n{text.rstrip()}" for name, text in command.texts.items()]
    return "\n".join([command.entrypoint, f"working directory: {built}", *files])


def write_target(command: Command, target: str, options: list[str], *, dry_run: bool) -> str:
    """Write the manifest or script into the current folder.

    Returns:
        What to do with it; with `dry_run` its text, and nothing is written.

    Raises:
        InputError: An option is wrong, or the command does not fit the target.
    """
    from ray_jobs import targets

    place = f"--target {target} -o"
    if target == "kuberay":
        text = targets.kubernetes(
            command, run_config.from_items(targets.Kubernetes, options, place=place)
        )
        path, then = Path(f"{command.name}.rayjob.yaml"), "kubectl apply -f"
    else:
        text = targets.slurm(command, run_config.from_items(targets.Slurm, options, place=place))
        path, then = Path(f"{command.name}.sbatch"), "sbatch"
    if dry_run:
        return text
    write_text(path, text)
    return f"wrote {path}; send it with `{then} {path}`"


def paths_of(run: RunConfig) -> list[tuple[str, Path]]:
    """A run's paths, each with its dotted key."""
    return list(_walk(run.model_dump()))


def _resolve(root: Any, words: list[str]) -> tuple[Any, list[str], list[str]]:
    """The command that the first words name, these words, and the rest."""
    command, rest = root, list(words)
    verb: list[str] = []
    while hasattr(command, "commands"):
        known = sorted(set(command.commands) - {"submit"})
        if not rest or rest[0] not in known:
            given = " ".join(["submit", *verb, *rest[:1]])
            raise InputError(f"{given}: unknown command; one of {', '.join(known)} comes there")
        verb.append(rest.pop(0))
        command = command.commands[verb[-1]]
    return command, verb, rest


def _paths(values: dict[str, Any]) -> list[Path]:
    """Every path among parsed values, defaults included."""
    found = []
    for value in values.values():
        items = value if isinstance(value, list | tuple) else [value]
        found += [item for item in items if isinstance(item, Path)]
    return found


def _rebased(words: list[str], paths: list[Path], storage: Path | None) -> list[str]:
    relative = {path for path in paths if not _is_absolute(path)}
    if not relative:
        return list(words)
    if storage is None:
        raise _refusal([str(path) for path in sorted(relative)])
    unnamed = relative - {Path(word) for word in words}
    if unnamed:
        raise InputError(
            f"the default {sorted(map(str, unnamed))[0]} would lie in the job's own folder, which "
            "goes with it; give that path"
        )
    return [str(storage / word) if Path(word) in relative else word for word in words]


def _on_storage(run: RunConfig, storage: Path | None) -> RunConfig:
    relative = [f"{key}: {path}" for key, path in paths_of(run) if not _is_absolute(path)]
    if relative and storage is None:
        raise _refusal(relative)
    return run_config.from_dump(_joined(run.model_dump(), storage)) if storage else run


def _refusal(relative: list[str]) -> InputError:
    listed = "\n".join(f"  {each}" for each in relative)
    return InputError(
        "relative paths mean nothing on the cluster, where a job runs in a folder of its own:\n"
        f"{listed}\nwrite them absolute, or name the shared storage they lie below with "
        "--storage /mnt/rayfuse"
    )


def _walk(value: Any, key: str = "") -> Iterator[tuple[str, Path]]:
    if isinstance(value, Path):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _walk(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _walk(inner, key)


def _joined(value: Any, storage: Path) -> Any:
    if isinstance(value, dict):
        return {key: _joined(inner, storage) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_joined(inner, storage) for inner in value]
    if isinstance(value, Path) and not _is_absolute(value):
        return storage / value
    return value


def _is_absolute(path: Path) -> bool:
    return path.is_absolute() or _URL.match(str(path)) is not None
