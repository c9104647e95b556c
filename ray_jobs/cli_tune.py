"""The `rayfuse tune` verb."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (typer reads it)
from typing import Annotated

import typer

from ray_jobs.cli_data import say


def tune(  # noqa: PLR0913 (options)
    config: Annotated[Path, typer.Argument(help="The run's YAML; of stages, the last is searched")],
    search: Annotated[Path, typer.Argument(help="SEARCH.yaml: dotted path -> distribution")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="dotted.path=value of the run, e.g. train.epochs=5"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The search's folder; default <run>-<SEARCH>")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Trials in all", min=1)] = None,
    hours: Annotated[float | None, typer.Option(help="Of this command, checkpoints within")] = None,
    gpu_hours: Annotated[float | None, typer.Option(help="Of the search's trials in all")] = None,
    until: Annotated[str | None, typer.Option(help="A time of day, e.g. 06:00")] = None,
    storage: Annotated[
        str | None, typer.Option(help="URL of a database for the study; default: a journal file")
    ] = None,
    confirm: Annotated[
        bool, typer.Option(help="Train the best trials again with other seeds, test the winner")
    ] = True,
    compare: Annotated[
        bool, typer.Option("--compare", help="CONFIG and SEARCH are two searches' folders: compare")
    ] = False,
    address: Annotated[str | None, typer.Option(help="Ray address; default: local")] = None,
) -> None:
    """Search over what SEARCH.yaml names; the same command continues an interrupted search.

    The best trials are trained again with other seeds; the winner is tested once, and report.html
    says what may be believed. With --compare A B: two finished searches side by side.
    """
    from ray_jobs import cluster
    from ray_jobs import config as run_config
    from ray_jobs import train as train_body
    from ray_jobs import tune as body
    from ray_jobs.search import budget, cost, space
    from ray_jobs.search.compare import compare as compared

    if compare:
        say(compared(config, search))
        return
    *stages, last = run_config.load(config, overrides or [])
    found = space.load(search, last)
    if trials is not None:
        found = found.model_copy(update={"trials": trials})
    plan = body.Plan(name or f"{last.name}-{search.stem}", last, found, storage, confirm)
    gpus = cost.gpus_per_worker(last.scaling)
    limits = budget.budget(hours, gpu_hours, until, gpus=gpus)
    with cluster.connect(address):
        for stage in stages:
            train_body.run(stage)
        folder = body.run(plan, limits, say)
    say(f"{plan.name}: {folder}")
