"""A toy model on made-up rows, trained on W gloo workers forked from this script.

Run as `python harness.py jobs.json`: one process imports torch, then forks the workers of each
job in turn. Each job writes <out>/rank-<r>.safetensors (final weights) and <out>/lines.json.
conftest.py loads the same file as a module for tests that need one worker only.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # imported by every optimizer: once here, not in each forked worker
from safetensors.torch import save_file
from torch import distributed, nn

from data.schema import MODALITIES, N_FEATURES, Batch
from data.tasks import TaskSpec
from fusion import registry
from fusion.model import FusionModel, Output, Phase, Term
from fusion.tasks import Task
from fusion.training import loop
from fusion.training.agreed import AgreedError
from fusion.training.config import CheckpointConfig, TrainConfig
from fusion.training.embeddings import ImageRows, Source
from fusion.training.optim import OptimConfig
from fusion.training.restore import start
from fusion.training.strategy import DataParallel, build_strategy

CLASSES = 3
SPEC = TaskSpec(name="toy", kind="multilabel", labels=("a", "b", "c"))


class Toy(FusionModel):
    """Two linear encoders, a head on their sum, a distance between them on paired rows."""

    modalities = ("ehr", "cxr")

    def __init__(self, *, dropout: float = 0.0, batch_norm: bool = False, phased: bool = False):
        nn.Module.__init__(self)
        self.ehr = nn.Linear(N_FEATURES, 8)
        self.cxr = nn.Linear(3, 8, bias=not batch_norm)
        self.norm = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, CLASSES)
        self.image_head = nn.Linear(8, 14)
        if phased:
            self.phases = (
                Phase("images", ("cxr", "image_head"), ("findings",), repeats=2),
                Phase("rest", ("ehr", "head"), ("task", "distance")),
            )

    def forward(self, batch: Batch) -> Output:
        lengths = batch.lengths[:, None]
        series = self.ehr(batch.ehr.sum(1) / lengths)
        images = self._encode(batch)
        paired = series[batch.cxr_index]
        fused = series.index_add(0, batch.cxr_index, images)
        logits = self.head(self.dropout(torch.tanh(fused)))
        findings = nn.functional.binary_cross_entropy_with_logits(
            self.image_head(images), batch.cxr_targets, reduction="none"
        )
        both = batch.present["ehr"][batch.cxr_index]
        distance = (images - paired).square().mean(1)[both].sum()
        return Output(
            logits,
            {"fused": fused},
            {
                "distance": Term(distance, ("ehr", "cxr"), 0.5),
                "findings": Term(findings.mean(1).sum(), ("cxr",), 2.0),
            },
        )

    def _encode(self, batch: Batch) -> torch.Tensor:
        images = batch.cxr.mean((2, 3))
        mode = self.norm.training
        self.norm.train(mode and len(images) > 1)
        encoded = self.norm(self.cxr(images if len(images) else torch.zeros(2, 3)))
        self.norm.train(mode)
        return encoded if len(images) else encoded[:0] + 0 * encoded.sum()


@dataclass
class Job:
    """One training run."""

    folder: str
    out: str
    world: int = 1
    model: str = "toy"
    options: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)
    optim: dict = field(default_factory=dict)
    every_steps: int | None = None
    every_minutes: float | None = None
    step_minutes: float = 0.0
    seed: int = 3
    rows: int = 17
    images: tuple = (0, 1, 2, 3)
    silent: tuple = (5,)
    measure: bool = False
    kill_rank: int | None = None
    kill_at: int = -1
    stop_at: int = -1
    local_census: bool = False
    poison: int | None = None
    init_from: dict = field(default_factory=dict)
    asynchronous: bool = True
    write_delay: float = 0.0
    full_disk_at: int | None = None
    strategy: str = "ddp"
    offload: str = "none"
    whole_elements: int = 0
    deaf: bool = False
    embeddings: str | None = None


def dataset(
    rows: int, image_size: int = 4, seed: int = 11, images=(0, 1, 2, 3), silent=(5,)
) -> list[dict]:
    """Rows one by one; those of `images` in every eight have images, row 3 has no series.

    Those of `silent` in every eight have no note.
    """
    rng = np.random.default_rng(seed)
    made = []
    for row in range(rows):
        steps = int(rng.integers(2, 6))
        ehr = rng.normal(size=(steps, N_FEATURES)).astype(np.float32)
        has_ehr = row != 3
        made.append(
            {
                "row": row,
                "ehr": ehr if has_ehr else np.zeros((1, N_FEATURES), np.float32),
                "has_ehr": has_ehr,
                "cxr": rng.normal(size=(3, image_size, image_size)).astype(np.float32),
                "has_cxr": row % 8 in images,
                "targets": (rng.random(CLASSES) < 0.5).astype(np.float32),
                "findings": (rng.random(14) < 0.3).astype(np.float32),
                "has_notes": row % 8 not in silent,
                "note": note(row, seed),
                **lab_results(row, seed),
            }
        )
    return made


def lab_results(row: int, seed: int) -> dict:
    """Some of five results; row 2 of every eight has none."""
    rng = np.random.default_rng([row, seed, 5])
    observed = (rng.random(5) < 0.8) & (row % 8 != 2)
    labs = np.where(observed, rng.random(5), 0).astype(np.float32)
    return {"labs": labs, "labs_observed": observed}


def note(row: int, seed: int) -> str:
    """A few words, whose number differs from row to row."""
    rng = np.random.default_rng([row, seed])
    words = ["fever", "chest", "pain", "no", "cough", "edema", "renal", "failure"]
    return " ".join(words[int(place)] for place in rng.integers(8, size=rng.integers(1, 12)))


def collate(rows: list[dict], epoch: int = 0) -> Batch:
    steps = max(len(row["ehr"]) for row in rows)
    ehr = np.zeros((len(rows), steps, N_FEATURES), np.float32)
    for index, row in enumerate(rows):
        ehr[index, : len(row["ehr"])] = row["ehr"]
    images = [row for row in rows if row["has_cxr"]]
    size = rows[0]["cxr"].shape[-1]
    present = {modality: torch.zeros(len(rows), dtype=torch.bool) for modality in MODALITIES}
    present["ehr"] = torch.tensor([row["has_ehr"] for row in rows])
    present["cxr"] = torch.tensor([row["has_cxr"] for row in rows])
    observed = torch.from_numpy(np.array([row["labs_observed"] for row in rows]))
    present["labs"] = observed.any(1)
    present["notes"] = torch.tensor([row["has_notes"] for row in rows])
    return Batch(
        ehr=torch.from_numpy(ehr),
        lengths=torch.tensor([len(row["ehr"]) for row in rows]),
        cxr=torch.from_numpy(
            np.array([row["cxr"] for row in images], np.float32).reshape(-1, 3, size, size)
        ),
        cxr_index=present["cxr"].nonzero().squeeze(1),
        present=present,
        targets=torch.from_numpy(np.array([row["targets"] for row in rows])),
        cxr_targets=torch.from_numpy(
            np.array([row["findings"] for row in images], np.float32).reshape(-1, 14)
        ),
        rows=np.array([row["row"] for row in rows]),
        notes=tuple(row["note"] for row in rows if row["has_notes"]),
        notes_index=present["notes"].nonzero().squeeze(1),
        labs=torch.from_numpy(np.array([row["labs"] for row in rows])),
        labs_observed=observed,
        draws=np.array([row["row"] + 1000 * epoch for row in rows], np.uint64),
    )


class Rows:
    """A BatchStream over rows in memory, the order rotated by eight an epoch, shares contiguous."""

    def __init__(self, rows: list[dict], size: int, rank: int = 0, world: int = 1) -> None:
        self.rows, self.size, self.rank, self.world = rows, size, rank, world
        self.used: list[tuple[int, int, list[int]]] = []

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.rows) // self.size)

    def epoch(self, epoch: int, start_step: int = 0):
        first = 8 * epoch % len(self.rows)
        order = self.rows[first:] + self.rows[:first]
        for step in range(start_step, self.steps_per_epoch):
            batch = order[step * self.size : (step + 1) * self.size]
            share = np.array_split(np.arange(len(batch)), self.world)[self.rank]
            self.used.append((epoch, step, [batch[index]["row"] for index in share]))
            yield collate([batch[index] for index in share], epoch) if len(share) else None


class Lines:
    """A log that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[dict] = []

    def write(self, kind, progress, values) -> None:
        self.lines.append({"kind": kind, **progress.dump(), "values": dict(values)})

    def rotate(self) -> None:
        pass


class LocalCensus(DataParallel):
    """What must not be: every worker divides by its own rows."""

    def sum(self, tensor):
        return tensor.clone() if len(tensor) > 30 else super().sum(tensor)


def deafen(name: str) -> None:
    """What must not be: no worker hears of the others' gradients."""
    if name == "ddp":
        DataParallel.accumulate = lambda self, phase, last: self._wrapped.no_sync()
    elif name == "zero3":
        stage3 = importlib.import_module("deepspeed.runtime.zero.stage3")

        def own_part(tensors, group):
            rank, world = distributed.get_rank(), distributed.get_world_size()
            flat = [tensor.flatten() for tensor in tensors]
            padded = [nn.functional.pad(part, (0, -len(part) % world)) for part in flat]
            return [part.chunk(world)[rank] for part in padded]

        stage3.reduce_scatter_coalesced = own_part
    else:
        sharded = importlib.import_module("deepspeed.runtime.zero.stage_1_and_2")
        sharded.DeepSpeedZeroOptimizer.allreduce_bucket = lambda self, bucket, *_, **__: (
            self.flatten(bucket)
        )


def images_of(rows: list[dict]) -> ImageRows:
    """What a run's embeddings are made from: the rows that have an image."""
    having = {row["row"]: row for row in rows if row["has_cxr"]}
    return ImageRows(
        np.array(sorted(having)),
        lambda chunks: (collate([having[row] for row in chunk.tolist()]) for chunk in chunks),
    )


class Layers:
    """Counts what a model's image encoder really computes: calls of each of its convolutions."""

    def __init__(self, model: FusionModel) -> None:
        self.calls = self.images = 0
        for module in model.get_submodule(model.image_encoder).modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(self._count)

    def _count(self, module, inputs, output) -> None:
        self.calls += 1
        self.images += len(output) if module.in_channels == 3 else 0


def factory(job: Job):
    if job.model == "toy":
        return lambda: Toy(**job.options)
    model = registry.get(job.model)
    config = model.Config.model_validate({"name": job.model, **model.TINY, **job.options})
    return lambda: model(config, SPEC)


def settings(job: Job) -> loop.Settings:
    return loop.Settings(
        TrainConfig(**{"epochs": 2, "batch_size": 8, "log_every_steps": 1, **job.train}),
        OptimConfig(**{"lr": 1e-2, **job.optim}),
        CheckpointConfig(
            every_steps=job.every_steps,
            every_minutes=job.every_minutes,
            asynchronous=job.asynchronous,
        ),
        job.seed,
    )


def session(job: Job, rank: int = 0) -> loop.Session:
    strategy = (
        LocalCensus() if job.local_census else build_strategy(job.strategy, "cpu", job.offload)
    )
    strategy.persistent_elements = job.whole_elements
    size = 4 if job.model == "toy" else 32
    rows = dataset(job.rows, size, images=job.images, silent=job.silent)
    if job.poison is not None:
        rows[job.poison]["ehr"][:] = np.nan
    task, chosen = Task(SPEC), settings(job)
    loop.prepare(strategy, factory(job), chosen)
    val = dataset(10, size, seed=5)
    made = loop.Session(
        strategy,
        task,
        chosen,
        Rows(rows, chosen.train.batch_size, rank, job.world),
        Rows(val, 4, rank, job.world),
        Path(job.folder),
        log=Lines(),
        document={"config": {"seed": job.seed}},
        init_from={prefix: Path(source) for prefix, source in job.init_from.items()},
    )
    if job.embeddings is not None:
        splits = {"train": images_of(rows), "val": images_of(val)}
        made.embeddings = Source(Path(job.embeddings), splits, {"made of": "these rows"}, 3)
    if job.step_minutes:
        # Worker 1's clock stands still: worker 0 alone decides.
        made.saver.clock = lambda: 60 * job.step_minutes * made.progress.updates * (rank == 0)
    if job.write_delay and rank:
        made.saver.on_written = lambda path: time.sleep(job.write_delay)
    made.stop_requested = lambda: _disturb(job, made, rank)
    return made


def _disturb(job: Job, made: loop.Session, rank: int) -> bool:
    updates = made.progress.updates
    if rank == job.kill_rank and updates == job.kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == job.world - 1 and updates == job.full_disk_at:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    return rank == 0 and updates == job.stop_at


def run_worker(job: Job, rank: int, store: str) -> None:
    torch.set_num_threads(1)
    if job.strategy != "single":
        distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=job.world
        )
    if job.deaf:
        deafen(job.strategy)
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    if job.measure:
        (out / f"rank-{rank}.json").write_text(json.dumps(measured(job, rank)))
        return
    made = session(job, rank)
    layers = Layers(made.strategy.model) if made.strategy.model.image_encoder else None
    error = None
    try:
        ending = loop.fit(made)
    except AgreedError as failure:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        ending, error = "error", str(failure)
    state = whole_weights(made.strategy)
    save_file(state, out / f"rank-{rank}.safetensors")
    result = {"ending": ending, "error": error, "progress": made.progress.dump()}
    result["used"] = made.train.used if job.embeddings is None else None
    result["encoder"] = vars(layers) if layers else None
    (out / f"rank-{rank}.json").write_text(json.dumps({**result, "lines": made.log.lines}))


def measured(job: Job, rank: int) -> dict[str, float]:
    """MiB of memory that building the model takes at most, and holds once training could begin."""

    def resident(line: str) -> float:
        status = Path("/proc/self/status").read_text()
        return float(status.split(f"{line}:")[1].split()[0]) / 1024

    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in ("peft", "deepspeed.runtime.zero.stage3"):
        importlib.import_module(name)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    made = session(job, rank)
    built = resident("VmHWM") - before
    start(made)
    return {"peak": built, "held": resident("VmRSS") - before}


def whole_weights(strategy) -> dict[str, torch.Tensor]:
    """This worker's weights; those of all workers' shards where they are sharded."""
    if getattr(strategy, "stage", 0) < 3:
        return {name: value.clone() for name, value in strategy.model.state_dict().items()}
    parts = strategy.gather(dict(strategy.weights()))
    return {name: value for part in parts for name, value in part.items()}


def run(job: Job) -> list[int]:
    """Fork the job's workers and wait; their exit codes."""
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    store = str(Path(job.folder) / f".store-{os.urandom(4).hex()}")
    workers = []
    for rank in range(job.world):
        pid = os.fork()
        if not pid:
            try:
                run_worker(job, rank, store)
                if rank == 0:
                    (Path(job.out) / "modules.json").write_text(json.dumps(list(sys.modules)))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        workers.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]


def import_as_workers_did(job: Job) -> None:
    """Import what a job's first worker did: here once, not in each worker of the next job."""
    listing = Path(job.out) / "modules.json"
    for name in json.loads(listing.read_text()) if listing.exists() else []:
        if name not in sys.modules:
            with contextlib.suppress(ImportError):  # a library made it as it ran
                importlib.import_module(name)


def main() -> None:
    jobs = [Job(**job) for job in json.loads(Path(sys.argv[1]).read_text())]
    if any(job.strategy.startswith("zero") for job in jobs):
        os.environ["DS_ACCELERATOR"] = "cpu"
        # Seconds of imports: once here, not in each forked worker.
        importlib.import_module("deepspeed.runtime.zero.stage3")
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    if any(job.model == "note_llm" for job in jobs):
        for family in ("llama", "bert"):
            importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        importlib.import_module("peft")
    codes = []
    for job in jobs:
        codes.append(run(job))
        import_as_workers_did(job)
    Path(sys.argv[2]).write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
