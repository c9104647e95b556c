"""The `rayfuse` command. Heavy libraries are imported inside verbs, so that --help is quick."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from data.errors import InputError
from ray_jobs import cli_cluster, cli_data, cli_plan, cli_runs, cli_tune
from ray_jobs.cli_data import say
from ray_jobs.supervise import Terminated

if TYPE_CHECKING:
    from ray_jobs.config import RunConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=(
        "Train and evaluate multimodal clinical models on Ray, from raw MIMIC tables to a report."
        "\n\n**First time:** `rayfuse doctor`, then `rayfuse demo` (no data access needed)."
        "\n\n**With MIMIC:**"
        " `rayfuse data extract --mimic-iv DIR --task mortality --out shards/ihm`,"
        " `rayfuse train RUN.yaml data.shards=shards/ihm`, `rayfuse evaluate runs/NAME`,"
        " `rayfuse report runs/NAME`."
    ),
)
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_runs.app, name="runs")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="dotted.path=value, e.g. optim.lr=3e-4 train.epochs=5"),
]
Folder = Annotated[Path, typer.Argument(help="A run's folder, e.g. runs/medfuse")]


def _extract_if_absent(run: RunConfig) -> None:
    from data.manifest import FILE_NAME
    from data.switches import Sources
    from ray_jobs import extract as body

    if (run.data.shards / FILE_NAME).is_file() or run.data.sources == Sources():
        return
    say(f"{run.data.shards}: no shards yet, extracting")
    body.run(
        run.data.sources, run.task, run.data.shards, preset=run.preset, config=run.data.extract
    )


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="A run's YAML: also check that its inputs exist")
    ] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="Look at every node instead")] = False,
    address: Annotated[str | None, typer.Option(help="Ray address; default RAY_ADDRESS")] = None,
) -> None:
    """Check this machine, and what a run needs: one line each, exit 1 if a run could not start.

    With --cluster: every node's versions, clock, GPUs, disk, base weights and shared storage.
    """
    from ray_jobs import doctor as body
    from ray_jobs import nodes

    lines, healthy = nodes.examine(config, address) if cluster else body.examine(config)
    say("\n".join(lines))
    raise typer.Exit(0 if healthy else 1)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The run's YAML (one run, or its stages)")],
    overrides: Overrides = None,
    fork: Annotated[
        bool, typer.Option(help="The name is taken by another config: take the next free name")
    ] = False,
    address: Annotated[str | None, typer.Option(help="Ray address; default: local")] = None,
) -> None:
    """Train what RUN.yaml describes; the same command continues an interrupted run.

    Shards that are absent are extracted first if the config names sources.
    """
    from ray_jobs import cluster
    from ray_jobs import config as run_config
    from ray_jobs import train as body

    runs = run_config.load(config, overrides or [])
    with cluster.connect(address):
        for run in runs:
            _extract_if_absent(run)
            folder = body.run(run, fork=fork)
            say(f"{run.name}: finished; evaluate with `rayfuse evaluate {folder}`")


@app.command()
def evaluate(
    run: Folder,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Rows to score")] = "test",
    unpaired_from: Annotated[
        Path | None,
        typer.Option(help="Ensemble: rows without an X-ray as this evaluated run predicts them"),
    ] = None,
) -> None:
    """Score a run's best weights: metrics with confidence intervals, predictions.parquet.

    With --unpaired-from two evaluated runs are pooled into a folder beside RUN.
    """
    from ray_jobs import ensemble
    from ray_jobs import evaluate as body

    if unpaired_from is None:
        body.run(run, split=split)
    else:
        out = run.parent / f"{run.name}-with-{unpaired_from.name}"
        ensemble.run(run, unpaired_from, out, split=split)
        run = out
    say(f"wrote {run}/eval/{split}/metrics.json; write the report with `rayfuse report {run}`")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="One run's folder, or several to compare")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file; default: report.html of the first run")
    ] = None,
) -> None:
    """Write one self-contained HTML report of a run, or of several compared."""
    from ray_jobs import report as body

    written = body.write_report(runs, out or runs[0] / "report.html")
    say(f"wrote {written}")


@app.command()
def export(
    run: Folder,
    out: Annotated[
        Path | None, typer.Option(help="New folder for it; default: export in the run's folder")
    ] = None,
) -> None:
    """Put a run's best weights and all that predicting needs into one folder.

    Weights (safetensors), config, preprocessing, a model card, and a hash of each file. Of a
    language model on notes: its adapters and head in peft's layout, the base by name and hash.
    """
    from fusion.adapters import WEIGHTS
    from ray_jobs import export as body

    written = body.run(run, out or run / "export")
    predict_with = f"predict with `rayfuse predict {written} INPUT --out predictions.parquet`"
    opened = "open it with peft, as its README.md shows"
    say(f"wrote {written}; {opened if (written / WEIGHTS).is_file() else predict_with}")


@app.command()
def predict(
    export: Annotated[Path, typer.Argument(help="A folder that `rayfuse export` wrote")],
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="Folder of tables (docs/export.md) or shards")
    ],
    out: Annotated[Path, typer.Option(help="Parquet file for the probabilities")],
    batch_size: Annotated[int, typer.Option(min=1, help="Episodes at a time")] = 64,
    gpu: Annotated[bool, typer.Option("--gpu", help="On the first GPU")] = False,
) -> None:
    """Predict new episodes with an export alone: a probability for each label of each episode.

    INPUT holds series.parquet or series.csv (episode_id, hours, channel, value) and, for models of
    X-rays, images.parquet or images.csv (episode_id, path).
    """
    from ray_jobs import predict as body

    count = body.run(export, source, out, batch_size=batch_size, gpu=gpu)
    say(f"wrote {out}: {count} episodes")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where tables, shards, runs, reports go")] = Path(
        "runs/demo"
    ),
    only: Annotated[
        Literal["synthetic", "real"] | None, typer.Option(help="Only one half of the demo")
    ] = None,
) -> None:
    """No data needed: a synthetic hospital, then the open MIMIC demo patients, to reports."""
    from ray_jobs import demo as body

    body.run(out, only=only, say=say)


@app.command()
def chaos(
    config: Annotated[
        Path | None, typer.Argument(help="The run's YAML; default: a small one on synthetic data")
    ] = None,
    overrides: Overrides = None,
    faults: Annotated[
        str, typer.Option(help="Comma-separated; default: all that the cluster can show")
    ] = "",
    folder: Annotated[
        Path, typer.Option(help="New folder for its runs; several nodes must share it")
    ] = Path("runs/chaos"),
    out: Annotated[Path | None, typer.Option(help="Page to put the table into")] = None,
    address: Annotated[str | None, typer.Option(help="Ray address; default: local")] = None,
) -> None:
    """Break a small run on purpose, before a week-long one breaks: killed workers and nodes, hangs.

    Trains it undisturbed, then once per fault, and compares the weights. `node` and `drain` take a
    node from the cluster.
    """
    from ray_jobs import chaos as body
    from ray_jobs import chaos_run, chaos_table, cluster

    if folder.exists():
        raise InputError(f"{folder}: exists already; choose another --folder, or remove it")
    names = faults.split(",") if faults else list(body.FAULTS)
    with cluster.connect(address, num_cpus=None if address else max(4, os.cpu_count() or 1)):
        run = chaos_run.prepare(config, overrides or [], folder)
        outcomes = body.run(run, names, synthetic=config is None, say=say)
    say(chaos_table.table(outcomes))
    if out is not None:
        chaos_table.write(outcomes, run, out)
        say(f"wrote {out}")


@app.command(name="import-weights")
def import_weights(
    system: Annotated[Literal["medfuse"], typer.Argument(help="Whose released checkpoint")],
    file: Annotated[Path, typer.Argument(help="The authors' .pth.tar")],
    out: Annotated[Path, typer.Option(help="safetensors file for `init_from:`")],
) -> None:
    """Turn the authors' released weights into ours (never unpickles code)."""
    from safetensors.torch import save_file

    from data.files import atomic_path
    from fusion.weights import import_medfuse

    weights = import_medfuse(file)
    with atomic_path(out) as target:
        save_file(weights, target)
    say(f"wrote {len(weights)} tensors of {system} to {out}")


app.command()(cli_tune.tune)
app.command()(cli_plan.plan)
app.command(context_settings=cli_cluster.SETTINGS)(cli_cluster.submit)


def main() -> None:
    """Run the command line; a fault the user can mend is one line and exit code 2."""
    logging.basicConfig(
        level=os.environ.get("RAYFUSE_LOG", "INFO"), format="%(message)s", stream=sys.stderr
    )
    try:
        app()
    except InputError as error:
        # Ray raises a twin of the worker's error whose own text is a remote traceback.
        cause = getattr(error, "cause", None) or error
        sys.stderr.write(f"rayfuse: {cause}\n")
        sys.exit(2)
    except SystemExit as stop:
        # Typer turns Ctrl-C into this exit, silently.
        cause = getattr(stop.__context__, "__cause__", None)
        if isinstance(cause, KeyboardInterrupt):
            left = str(cause) or "interrupted; the same command continues where it was"
            sys.stderr.write(f"rayfuse: {left}\n")
        if isinstance(cause, Terminated):
            sys.exit(128 + signal.SIGTERM)
        raise


if __name__ == "__main__":
    main()
