"""`rayfuse data embed`: the vectors of a run's texts into a store, computed by a pool of actors.

What is in the store already is not computed again. Actors get row numbers and give vectors, so that
no text passes through Ray; this process alone writes. Each part is a file of its own that appears
by one rename: a command that is killed loses the parts in flight.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from data.errors import InputError
from data.folds import fold_of
from data.reader import ShardReader
from fusion.encoders.text_store import Shelf, declare, serve
from fusion.training.checkpoint import read_weights
from fusion.training.text_vectors import extractor_of
from ray_jobs import capacity, inference, lineage
from ray_jobs.embedder import Embedder, Order
from ray_jobs.runs import RunFolder
from ray_jobs.texts import SPLITS, Text, texts_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from fusion.encoders.text_store import Extractor
    from ray_jobs.config import RunConfig

LARGEST_PART: Final = 256
SMALLEST_PART: Final = 16
PARTS_PER_ACTOR: Final = 4
SAY_EVERY_S: Final = 10.0
_LEFT_OUT: Final = "data.batches.leave_out"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How texts are embedded.

    Attributes:
        actors: Most actors; 0 computes in this process, without Ray.
        splits: Whose rows.
        tokens_per_pass: Most tokens of a pass, padding counted.
    """

    actors: int = 1
    splits: tuple[str, ...] = SPLITS
    tokens_per_pass: int = 16384


@dataclass
class Outcome:
    """What was done: distinct texts asked for, those that were there, and those computed."""

    asked: int = 0
    present: int = 0
    computed: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        rate = self.tokens / max(time.monotonic() - self.started, 1e-9)
        return (
            f"{self.asked} texts, {self.present} present, {self.computed} computed "
            f"({self.tokens} tokens, {rate:.0f} tokens/s)"
        )


@dataclass(frozen=True)
class TextRun:
    """A finished run whose text encoder embeds.

    Attributes:
        folder: As it was named.
        config: The run's.
        extractor: What its vectors depend on.
        meta: Of its best weights.
    """

    folder: Path
    config: RunConfig
    extractor: Extractor
    meta: dict[str, Any]

    @property
    def options(self) -> Any:
        """Its model's block."""
        return self.config.model


def run(
    run_folder: Path, out: Path, *, folds: Sequence[Path] = (), settings: Settings | None = None
) -> Outcome:
    """Embed the texts of a run's shards, and serve them to runs with `model.embeddings`.

    Args:
        run_folder: A finished run with a text encoder; its best weights are used.
        out: The store; absent, or with what other runs of this command have left.
        folds: Runs that are equal to it but for the fold that each leaves out: a row of the train
            split then has the vector of the one that has not seen its patient.
        settings: How.

    Raises:
        InputError: A run is not finished or has no language model, the folds do not fit, the shards
            are others than those they were trained on, or the store cannot be written.
    """
    settings = settings or Settings()
    main = open_run(run_folder)
    others = _ordered(main, [open_run(folder) for folder in folds])
    reader = ShardReader(main.config.data.shards, main.config.data.batches.cache_dir)
    for each in (main, *others):
        inference.check_learnt_on(each.config, each.meta, reader.manifest)
    outcome = Outcome()
    with _alone(out):
        texts = {split: list(texts_of(reader, split, main.options.text)) for split in SPLITS}
        served = _by_row(reader, texts, len(others))
        for place, each in enumerate((main, *others)):
            wanted = {
                text.key: text
                for split in settings.splits
                for text in texts[split]
                if served[text.row] == place
            }
            _fill(each, declare(out, each.extractor), list(wanted.values()), settings, outcome)
        rows = [(text.row, text.key, served[text.row]) for split in SPLITS for text in texts[split]]
        serve(
            out,
            [each.extractor for each in (main, *others)],
            " ".join(
                ["rayfuse data embed", str(run_folder)]
                + [f"--fold {each.folder}" for each in others]
                + [f"--out {out}"]
            ),
            rows if others else None,
        )
    return outcome


def splits_of(text: str) -> tuple[str, ...]:
    """Names of splits, separated by commas.

    Raises:
        InputError: One is none.
    """
    names = tuple(text.split(","))
    if wrong := [name for name in names if name not in SPLITS]:
        raise InputError(f"--splits: {wrong[0]!r} is none of {', '.join(SPLITS)}")
    return names


def open_run(folder: Path) -> TextRun:
    """A run whose texts can be embedded; its base is not read.

    Raises:
        InputError: It is not finished, or has no language model of its own.
    """
    from fusion.encoders.text import TextOptions

    config = inference.load_config(folder)
    options: Any = config.model
    if not isinstance(options, TextOptions):
        raise InputError(
            f"{folder}: model.name={options.name} reads no text; give a run of note_llm or "
            "medfuse_llm"
        )
    if (kept := getattr(options, "embeddings", None)) is not None:
        raise InputError(
            f"{folder}: its own texts come from model.embeddings={kept}; give the run that those "
            "are of"
        )
    weights, meta = read_weights(RunFolder(folder).best)
    return TextRun(folder, config, extractor_of(options, config.train, weights, meta), meta)


def _ordered(main: TextRun, folds: Sequence[TextRun]) -> list[TextRun]:
    """The runs of all folds of one number, in order, if they are that."""
    if not folds:
        return []
    if main.config.data.batches.leave_out is not None:
        raise InputError(
            f"{main.folder}: leaves out a fold itself; give the run that was trained on all "
            "patients first, and this one by --fold"
        )
    by_fold: dict[int, TextRun] = {}
    for each in folds:
        left = each.config.data.batches.leave_out
        if left is None or left.of != len(folds) or left.fold in by_fold:
            asked = "none" if left is None else f"{left.fold} of {left.of}"
            raise InputError(
                f"{each.folder}: {_LEFT_OUT} is {asked}, but {len(folds)} runs by --fold must "
                f"leave out each of 0 to {len(folds) - 1} of {len(folds)} once"
            )
        by_fold[left.fold] = each
        _refuse_other_config(main, each)
    return [by_fold[fold] for fold in range(len(folds))]


def _refuse_other_config(main: TextRun, fold: TextRun) -> None:
    differing = [
        line
        for line in lineage.differences(main.config, fold.config)
        if not line.startswith(_LEFT_OUT)
    ]
    if differing:
        listed = "\n".join(f"  {line}" for line in differing)
        raise InputError(
            f"{fold.folder}: not the run of {main.folder} but for its fold:\n{listed}\n"
            "train it with the same config"
        )


def _by_row(reader: ShardReader, texts: dict[str, list[Text]], folds: int) -> dict[int, int]:
    """Which extractor serves each row: of the train split the one that has not seen its patient."""
    served = {text.row: 0 for split in SPLITS for text in texts[split]}
    if folds:
        train = [text.row for text in texts["train"]]
        subjects = reader.subjects(np.array(train, np.int64))
        served |= {
            row: 1 + fold_of(subject, folds) for row, subject in zip(train, subjects, strict=True)
        }
    return served


def _fill(
    text_run: TextRun, place: Path, wanted: list[Text], settings: Settings, outcome: Outcome
) -> None:
    """Compute what an extractor's folder lacks of some distinct texts."""
    shelf = Shelf(place)
    for path, fault in shelf.damaged.items():
        logger.warning("%s: damaged (%s); computed again", path, fault)
        path.unlink()
    # Texts of similar length share a part: a part's passes then hold little padding.
    missing = sorted(
        (text for text in wanted if text.key not in shelf), key=lambda text: -text.size
    )
    outcome.asked += len(wanted)
    outcome.present += len(wanted) - len(missing)
    name, done, said = text_run.config.name, 0, time.monotonic()
    for keys, vectors, counts in _computed(text_run, missing, settings):
        try:
            shelf.add(keys, vectors, counts)
        except OSError as error:
            raise InputError(
                f"{place}: cannot be written ({os.strerror(error.errno or 0)}); free space there"
            ) from None
        done += len(keys)
        outcome.computed += len(keys)
        outcome.tokens += int(counts[:, 0].sum())
        if time.monotonic() - said > SAY_EVERY_S:
            logger.info("%s: %d of %d texts", name, done, len(missing))
            said = time.monotonic()
    if absent := sum(text.key not in shelf for text in missing):
        raise InputError(
            f"{text_run.config.data.shards}: {absent} of {len(missing)} texts are others where the "
            "actors run; every node needs the same shards"
        )


def _computed(
    text_run: TextRun, missing: list[Text], settings: Settings
) -> Iterator[tuple[list[bytes], torch.Tensor, torch.Tensor]]:
    """Keys, [N, D] vectors and [N, 3] counts of the texts, a part at a time as they come."""
    if not missing:
        return
    actors = max(settings.actors, 1)
    size = min(LARGEST_PART, max(SMALLEST_PART, len(missing) // (PARTS_PER_ACTOR * actors)))
    numbers = [text.row for text in missing]
    items = [{"rows": numbers[first : first + size]} for first in range(0, len(numbers), size)]
    order = Order(
        folder=text_run.folder.absolute(),
        shards=text_run.config.data.shards.absolute(),
        weights=text_run.meta["sha256"],
        tokens_per_pass=settings.tokens_per_pass,
    )
    results = _by_ray(text_run, items, order, settings.actors) if settings.actors else None
    for result in results or map(Embedder(order), items):
        if result["fault"]:
            raise InputError(result["fault"])
        keys = [result["keys"][first : first + 32] for first in range(0, len(result["keys"]), 32)]
        vectors = torch.frombuffer(bytearray(result["vectors"]), dtype=torch.float32)
        counts = torch.frombuffer(bytearray(result["counts"]), dtype=torch.int32)
        yield keys, vectors.view(len(keys), -1), counts.view(len(keys), -1)


def _by_ray(
    text_run: TextRun, items: list[dict[str, Any]], order: Order, actors: int
) -> Iterator[dict[str, Any]]:
    """The parts by a pool of actors, each with what a worker of the run asks for."""
    import ray.data

    scaling = text_run.config.scaling
    capacity.check(scaling.model_copy(update={"num_workers": 1}))
    needed = capacity.per_worker(scaling)
    cpus = needed.pop("CPU", 1.0)
    rows = ray.data.from_items(items, override_num_blocks=len(items))
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    computed = rows.map(
        Embedder,
        fn_constructor_kwargs={"order": order, "threads": max(1, int(cpus))},
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(actors, len(items))),
        num_cpus=cpus,
        num_gpus=needed.pop("GPU", 0.0),
        **({"resources": needed} if needed else {}),
    )
    results: Iterator[dict[str, Any]] = computed.iter_rows()
    return results


@contextmanager
def _alone(store: Path) -> Iterator[None]:
    """Keep a second process from filling the same store."""
    store.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = store / ".lock"
    path.touch(mode=0o600)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{store} is being filled by another process; wait for it, or end it"
            ) from None
        yield
