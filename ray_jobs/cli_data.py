"""The `rayfuse data` verbs: raw tables to shards, and texts to vectors."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help=(
        "Raw tables to shards: synth or fetch, plan, stage, extract, then describe, check, diff;"
        " and embed, texts to vectors."
        "\n\nExample: `rayfuse data synth --out hospital --patients 500`, then"
        " `rayfuse data extract --mimic-iv hospital/mimiciv/2.2"
        " --mimic-cxr hospital/mimic-cxr-jpg/2.0.0 --task phenotyping_48h --out shards/pheno`."
    ),
)

PresetName = Literal["corrected", "code", "paper"]
ReleaseName = Literal["mimic-iv-2.2", "mimic-iv-3.1", "mimic-iii-1.4"]
Shards = Annotated[Path, typer.Argument(help="A folder of extracted shards")]
Task = Annotated[
    str,
    typer.Option(
        help="mortality, phenotyping, phenotyping_48h, radiology, diagnoses or diagnoses_femh"
    ),
]
MimicIV = Annotated[Path | None, typer.Option(help="MIMIC-IV 1.0, 2.2 or 3.1, raw or staged")]
MimicIII = Annotated[Path | None, typer.Option(help="MIMIC-III 1.4, raw or staged")]
Meds = Annotated[Path | None, typer.Option(help="A MEDS dataset, for tasks of admissions")]
MimicCXR = Annotated[Path | None, typer.Option(help="MIMIC-CXR-JPG 2.0 or 2.1")]


def say(text: str) -> None:
    """One message to standard output."""
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


@app.command()
def synth(
    out: Annotated[Path, typer.Option(help="Absent or empty folder for the hospital")],
    patients: Annotated[int, typer.Option(help="How many")] = 500,
    seed: Annotated[int, typer.Option(help="The same seed gives the same hospital")] = 0,
    release: Annotated[ReleaseName, typer.Option(help="Layout of the tables")] = "mimic-iv-2.2",
    image_size: Annotated[int, typer.Option(help="Pixels a side of the X-rays")] = 256,
    events: Annotated[int, typer.Option(help="Chart events per stay; 4300 is as in MIMIC")] = 600,
    truth: Annotated[bool, typer.Option(help="Print the best reachable scores")] = True,
) -> None:
    """Write a synthetic hospital in MIMIC's own layout, with known truth (no real patient)."""
    from data.sources.synthetic import generate, truth_report

    made = generate(
        out,
        patients=patients,
        seed=seed,
        release=release,
        image_size=image_size,
        chart_events_per_stay=events,
        cxr=release != "mimic-iii-1.4",
    )
    say(f"wrote {made.patients} patients to {made.ehr}")
    if truth:
        say(truth_report(out))


@app.command()
def fetch(
    name: Annotated[
        Literal["mimic-iv-demo", "mimic-iii-demo"], typer.Argument(help="Which open demo")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the files")],
    base_url: Annotated[str | None, typer.Option(help="A mirror; default PhysioNet")] = None,
) -> None:
    """Download an open demo from PhysioNet; resumes, and verifies the published checksums."""
    from data.fetch import fetch as body

    report = body(name, out, base_url)
    say(f"{out}: {len(report.downloaded)} files downloaded, {len(report.kept)} were there")


@app.command()
def plan(
    task: Task = "phenotyping",
    mimic_iv: MimicIV = None,
    mimic_iii: MimicIII = None,
    mimic_cxr: MimicCXR = None,
    out: Annotated[Path, typer.Option(help="Where the shards would go")] = Path("shards"),
) -> None:
    """Disk, memory and time of an extraction, from file sizes; exit 1 if it cannot fit."""
    from data.estimate import plan_extraction
    from data.switches import Sources

    sources = Sources(mimic_iv=mimic_iv, mimic_iii=mimic_iii, mimic_cxr=mimic_cxr)
    needs = plan_extraction(sources, task, out)
    say(needs.text())
    raise typer.Exit(1 if needs.lacks else 0)


@app.command()
def stage(
    out: Annotated[Path, typer.Option(help="Folder for the staged release")],
    mimic_iv: MimicIV = None,
    mimic_iii: MimicIII = None,
    partitions: Annotated[int, typer.Option(help="Subject partitions; 0 chooses")] = 0,
) -> None:
    """Raw tables to typed Parquet by subject, once per release: later extractions start there."""
    from data.errors import InputError
    from data.stage import stage as body

    folder = mimic_iv or mimic_iii
    if folder is None or (mimic_iv and mimic_iii):
        raise InputError("name one release to stage: --mimic-iv DIR or --mimic-iii DIR")
    staged = body(folder, out, partitions=partitions)
    say(f"{out}: {staged.release} in {staged.partitions} partitions")


@app.command()
def extract(  # noqa: PLR0913
    task: Task,
    out: Annotated[Path, typer.Option(help="Folder for shards and manifest")],
    mimic_iv: MimicIV = None,
    mimic_iii: MimicIII = None,
    mimic_cxr: MimicCXR = None,
    notes: Annotated[Path | None, typer.Option(help="MIMIC-IV-Note or NOTEEVENTS")] = None,
    meds: Meds = None,
    preset: Annotated[PresetName, typer.Option(help="Corrected or published rules")] = "corrected",
    switches: Annotated[
        list[str] | None,
        typer.Argument(help="switch=value, e.g. timestep_hours=2 (docs/presets.md)"),
    ] = None,
) -> None:
    """Cohort, series, images and labels into shards; a killed extraction continues."""
    from data.switches import Sources
    from ray_jobs import cluster
    from ray_jobs import extract as body
    from ray_jobs.config import checked, extract_config

    folders = {
        "mimic_iv": mimic_iv,
        "mimic_iii": mimic_iii,
        "mimic_cxr": mimic_cxr,
        "notes": notes,
        "meds": meds,
    }
    sources = checked(Sources, folders, place="sources")
    config = extract_config(preset, switches or [])
    with cluster.connect():
        manifest = body.run(sources, task, out, preset=preset, config=config)
    say(
        f"{out}: {manifest.rows} samples of {task} from {manifest.release}; "
        f"see `rayfuse data describe {out}`"
    )


@app.command()
def embed(
    run: Annotated[Path, typer.Argument(help="A finished run of note_llm or medfuse_llm")],
    out: Annotated[Path, typer.Option(help="The store; what is in it is not computed again")],
    fold: Annotated[
        list[Path] | None,
        typer.Option(help="Out of fold: each run that leaves out a fold (data.batches.leave_out)"),
    ] = None,
    actors: Annotated[
        int, typer.Option(min=0, help="Most actors; 0 computes in this process, without Ray")
    ] = 1,
    splits: Annotated[str, typer.Option(help="Comma-separated")] = "train,val,test",
    tokens_per_pass: Annotated[
        int, typer.Option(min=1, help="Most tokens of a pass, padding counted")
    ] = 16384,
) -> None:
    """Keep the vectors of a run's texts, for `model.embeddings` of medfuse_llm; resumes.

    With --fold once for each of K runs, a patient of the train split has the vectors of the run
    that has not seen them, everyone else those of RUN.
    """
    from ray_jobs import cluster
    from ray_jobs import embed as body

    settings = body.Settings(actors, body.splits_of(splits), tokens_per_pass)
    with cluster.connect() if actors else nullcontext():
        done = body.run(run, out, folds=fold or [], settings=settings)
    say(f"{out}: {done}; read them with model.embeddings={out}")


@app.command()
def describe(shards: Shards) -> None:
    """Cohort flow, prevalences, overlap, what was set aside, and what the ICD rules change."""
    from data.describe import describe as body

    say(body(shards))


@app.command()
def check(shards: Shards) -> None:
    """Verify hashes, schema, patient-disjoint splits and point in time; exit 1 on a problem."""
    from data.check import check as body

    problems = body(shards)
    say("\n".join(problems) if problems else f"{shards}: sound")
    raise typer.Exit(1 if problems else 0)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="A folder of shards")],
    b: Annotated[Path, typer.Argument(help="Another")],
) -> None:
    """Explain how two cohorts differ, rule by rule."""
    from data.diff import diff as body

    say(body(a, b))
