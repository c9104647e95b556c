"""`rayfuse submit`: the same command, elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from data.errors import InputError
from ray_jobs.cli_data import say

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# What follows the verb belongs to it, options too.
SETTINGS = {"allow_interspersed_args": False}
Storage = Annotated[Path | None, typer.Option(help="Shared storage below which relative paths lie")]


def submit(
    words: Annotated[
        list[str], typer.Argument(metavar="VERB ...", help="Any rayfuse command: train RUN.yaml")
    ],
    address: Annotated[
        str | None,
        typer.Option(help="The cluster's dashboard; default RAY_API_SERVER_ADDRESS or port 8265"),
    ] = None,
    storage: Storage = None,
    target: Annotated[
        Literal["ray", "kuberay", "slurm"],
        typer.Option(help="A running Ray cluster, or a RayJob or sbatch script to write"),
    ] = "ray",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="key=value of the target, e.g. -o time=12:00:00"),
    ] = None,
    installed: Annotated[
        bool, typer.Option("--installed", help="Use the wheel on the nodes; upload the YAML only")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the log")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent")] = False,
) -> None:
    """Run a rayfuse command on a cluster: `rayfuse submit --storage /mnt/x train RUN.yaml`.

    The log is followed until the job has ended, and its exit code is this command's. Ctrl-C only
    leaves the log; `rayfuse runs logs NAME` comes back to it, `rayfuse runs stop NAME` ends the
    job with a checkpoint, and the same submit continues the run.
    """
    import typer.main

    from ray_jobs import cli
    from ray_jobs import submit as body

    root = typer.main.get_command(cli.app)
    command = body.prepare(root, words, storage.absolute() if storage else None)
    if target != "ray":
        written = body.write_target(command, target, option or [], dry_run=dry_run)
        say(written)
        return
    if option:
        raise InputError("--option belongs to --target kuberay or slurm")
    if dry_run:
        say(body.describe(command, code=not installed))
        return
    from ray_jobs import jobs

    client = jobs.connect(address)
    job = body.send(command, client, code=not installed)
    say(f"submitted {job}")
    if not detach:
        raise typer.Exit(follow(client, job))


def follow(client: JobSubmissionClient, job: str) -> int:
    """A job's log on standard output until it ends; Ctrl-C leaves it running."""
    import sys

    from ray_jobs import jobs

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        return jobs.follow(client, job, write)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"left the log; {job} goes on. Come back: `rayfuse runs logs {job}`; end it: "
            f"`rayfuse runs stop {job}`"
        ) from None
