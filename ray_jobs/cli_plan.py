"""`rayfuse plan`: what a run needs, on machines that may not be there yet."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003
from typing import TYPE_CHECKING, Annotated

import typer

from data.errors import InputError
from ray_jobs.cli_data import say

if TYPE_CHECKING:
    from ray_jobs.plan import Plan


def plan(  # noqa: PLR0913
    config: Annotated[Path | None, typer.Argument(help="The run's YAML")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.path=value")] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes of a cluster that is described")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of each of them; 0: train on CPUs")] = None,
    gpu_kind: Annotated[str, typer.Option(help="V100, A100, H100, H200, L4, ...")] = "A100",
    gpu_memory: Annotated[str | None, typer.Option(help="Of each GPU, e.g. 40GiB")] = None,
    node_memory: Annotated[str | None, typer.Option(help="Of each node, e.g. 512GiB")] = None,
    network: Annotated[float, typer.Option(help="Gbit/s between nodes")] = 100.0,
    shape: Annotated[
        str | None, typer.Option(help="Instead of a YAML: llama-3-8b or llama-2-13b")
    ] = None,
    sequence: Annotated[int, typer.Option(help="With --shape: tokens of a row")] = 2048,
    batch: Annotated[int, typer.Option(help="With --shape: rows of a step")] = 64,
    lora_rank: Annotated[int, typer.Option(help="With --shape: of the adapters")] = 16,
    precision: Annotated[str, typer.Option(help="With --shape: bf16 or fp32")] = "bf16",
    recompute: Annotated[bool, typer.Option(help="With --shape: recompute activations")] = True,
    arithmetic: Annotated[bool, typer.Option("--arithmetic", help="Show the sum")] = False,
    address: Annotated[str | None, typer.Option(help="Ray address; default RAY_ADDRESS")] = None,
) -> None:
    """Reckon memory, disk and time of a run under every strategy, and say which to take.

    For the cluster described by --nodes and --gpus, else for the one at RAY_ADDRESS, else for this
    machine. Nothing is allocated. Exit 1 if nothing fits.

    `rayfuse plan RUN.yaml --nodes 4 --gpus 8 --gpu-memory 80GiB`
    """
    from ray_jobs import config as run_config
    from ray_jobs import plan as body
    from ray_jobs import plan_machines, plan_text

    if (config is None) == (shape is None):
        raise InputError("plan: name a run's YAML, or --shape with one of the known shapes")
    is_described = nodes is not None or gpus is not None
    runs = run_config.load(config, overrides or []) if config is not None else [None]
    fitting = True
    for run in runs:
        if is_described:
            machines = plan_machines.described(
                nodes=1 if nodes is None else nodes,
                gpus=8 if gpus is None else gpus,
                kind=gpu_kind,
                gpu_memory=gpu_memory,
                node_memory=node_memory,
                network=network,
                workers=run.scaling.most if run is not None else 1,
            )
        elif run is not None and plan_machines.named_cluster(address):
            machines = plan_machines.live(run, address)
        else:
            machines = plan_machines.local_machine(run)
        found: Plan
        if run is not None:
            found = body.plan_run(run, machines)
        else:
            assert shape is not None
            found = body.plan_shape(
                shape,
                machines,
                sequence=sequence,
                batch=batch,
                lora_rank=lora_rank,
                train=body.shape_training(precision, recompute=recompute),
            )
        say(plan_text.text(found, arithmetic=arithmetic))
        fitting = fitting and bool(found.best)
    raise typer.Exit(0 if fitting else 1)
