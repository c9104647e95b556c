"""The `rayfuse runs` verbs: what became of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ray_jobs.cli_data import say

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help=(
        "Runs, their folders, and their jobs on a cluster."
        "\n\nExample: `rayfuse runs ls` lists those below `runs`; `rayfuse runs ls --address"
        " http://127.0.0.1:8265` the jobs of a cluster, `rayfuse runs logs NAME` follows one."
    ),
)

Name = Annotated[str, typer.Argument(help="A run's name, or a job's id")]
Address = Annotated[
    str | None,
    typer.Option(help="The cluster's dashboard; default RAY_API_SERVER_ADDRESS or port 8265"),
]


@app.command()
def ls(
    folder: Annotated[Path, typer.Argument(help="Folder of runs")] = Path("runs"),
    address: Annotated[
        str | None, typer.Option(help="List the jobs of the cluster with this dashboard instead")
    ] = None,
) -> None:
    """List the runs below a folder: state, task, model, step, best score."""
    from ray_jobs import jobs, runs

    if address is None:
        say(runs.listing(folder))
    else:
        say(jobs.listing(jobs.connect(address)))


@app.command()
def logs(name: Name, address: Address = None) -> None:
    """Follow the log of a run that `rayfuse submit` sent, from its start until it ends.

    The exit code is the job's; Ctrl-C leaves the log, and the job goes on.
    """
    from ray_jobs import cli_cluster, jobs

    client = jobs.connect(address)
    job = str(jobs.details(client, name).submission_id)
    raise typer.Exit(cli_cluster.follow(client, job))


@app.command()
def stop(
    name: Name,
    now: Annotated[
        bool, typer.Option("--now", help="Kill it; the last checkpoint is where it goes on")
    ] = False,
    address: Address = None,
) -> None:
    """End a submitted run after its step and a checkpoint, and wait for that.

    The same `rayfuse submit` continues it.
    """
    from ray_jobs import jobs

    client = jobs.connect(address)
    ended = jobs.stop(client, jobs.details(client, name), now=now)
    say(f"{ended.submission_id}: {ended.status.value.lower()}")


@app.command()
def gc(
    folder: Annotated[Path, typer.Argument(help="A run's folder, or one of runs")] = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go")] = False,
    keep: Annotated[
        int | None,
        typer.Option(min=0, help="Checkpoints to keep; default: each run's checkpoint.num_to_keep"),
    ] = None,
) -> None:
    """Remove what no run needs: torn checkpoints, surplus ones, what killed commands left.

    Best weights stay, and so does the newest whole checkpoint of an unfinished run. A run that is
    being trained is left alone. Buckets are not touched.
    """
    from ray_jobs import garbage

    say(garbage.report(garbage.collect(folder, keep=keep, dry_run=dry_run), dry_run=dry_run))


@app.command()
def pull(
    uri: Annotated[str, typer.Argument(help="A run in a bucket, e.g. s3://BUCKET/PREFIX/NAME")],
    out: Annotated[Path, typer.Option(help="Folder that holds the folders of runs")] = Path("runs"),
) -> None:
    """Fetch a run from its bucket, to evaluate, report or export it here.

    Its config, metrics, best weights and newest whole checkpoint come, into OUT/NAME.
    """
    from ray_jobs import mirror

    folder = mirror.fetch(uri, out)
    say(f"fetched {folder}; evaluate with `rayfuse evaluate {folder}`")
