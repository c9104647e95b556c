"""The `rayfuse runs` verbs: what became of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ray_jobs.cli_data import say

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Runs and their folders.\n\nExample: `rayfuse runs ls` lists those below `runs`.",
)


@app.command()
def ls(
    folder: Annotated[Path, typer.Argument(help="Folder of runs")] = Path("runs"),
) -> None:
    """List the runs below a folder: state, task, model, step, best score."""
    from ray_jobs.runs import listing

    say(listing(folder))
