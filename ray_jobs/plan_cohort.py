"""What a plan reckons with: the training rows of a run, and how a worker's share of them is cut."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from data.errors import InputError
from data.manifest import Manifest
from data.schema import N_CHANNELS
from fusion.encoders.text import TextEncoder
from fusion.planning.dry import Rows
from fusion.planning.options import Cut

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from data.tasks import TaskSpec
    from fusion.model import FusionModel
    from fusion.training.config import TrainConfig
    from ray_jobs.config import RunConfig

ACCUMULATIONS = (1, 2, 4, 8)
SAMPLED_ROWS = 20_000
SAMPLED_TEXTS = 2_000


@dataclass(frozen=True)
class Cohort:
    """What a run trains on.

    Attributes:
        rows: Training rows of an epoch.
        images: Share of them that has an image.
        lengths: Sorted sample of the lengths of their series.
        cache: Bytes of the shards, and so about of the row cache on each node.
        texts: Sample of their notes and results.
        lab_columns: Of the lab matrix that the run reads.
    """

    rows: int
    images: float
    lengths: np.ndarray
    cache: int
    texts: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    lab_columns: int = 0

    def micro(self, rows: int, image_size: int) -> Rows:
        """An unlucky micro-batch: its longest row is the longest of all, and images are many.

        Images: their mean number and three standard deviations more.
        """
        lengths = self.lengths[_spread(len(self.lengths), rows)]
        share = self.images
        images = rows * share + 3 * math.sqrt(rows * share * (1 - share))
        return Rows(
            tuple(lengths.tolist()),
            min(rows, math.ceil(images)),
            image_size,
            lab_columns=self.lab_columns,
        )


class Texts:
    """The texts of a cohort as a model's encoder reads them.

    Attributes:
        lengths: [N] sorted, the tokens of each; 1 for a row without text.
    """

    def __init__(self, cohort: Cohort, encoder: TextEncoder, spec: TaskSpec) -> None:
        self._cohort = cohort
        self._encoder = encoder
        batch = Rows((1,) * len(cohort.texts), texts=cohort.texts).batch(spec)
        lengths = np.array([len(text.ids) if text else 1 for text in encoder.read(batch)])
        self._order = lengths.argsort(kind="stable")
        self.lengths = lengths[self._order]

    def cuts(self, share: int, tokens: int) -> Iterator[tuple[Cut, Rows]]:
        """A share whose longest text is the longest of all, cut by budgets of tokens.

        Beside each cut its largest pass, padding counted.
        """
        places = _spread(len(self.lengths), share)
        lengths = self.lengths[places].tolist()
        seen: set[int] = set()
        for budget in (tokens // part for part in ACCUMULATIONS if tokens >= part):
            passes = self._encoder.groups(lengths, budget)
            if len(passes) in seen:
                continue
            seen.add(len(passes))
            largest = max(passes, key=lambda rows: self._encoder.area([lengths[r] for r in rows]))
            cut = Cut(len(passes), len(largest), f"train.tokens_per_pass={budget}")
            yield cut, self._rows(places[largest])

    def longest(self, rows: int) -> Rows:
        """Rows spread over all lengths, the longest among them."""
        return self._rows(_spread(len(self.lengths), rows))

    def _rows(self, places: Sequence[int] | np.ndarray) -> Rows:
        texts = tuple(self._cohort.texts[self._order[place]] for place in places)
        return Rows((1,) * len(texts), texts=texts, lab_columns=self._cohort.lab_columns)


def texts_of(cohort: Cohort, model: FusionModel, spec: TaskSpec) -> Texts | None:
    """The cohort's texts, if the model has an encoder that reads them.

    Raises:
        InputError: It has one, and there are none.
    """
    encoders = (module for module in model.modules() if isinstance(module, TextEncoder))
    encoder = next(encoders, None)
    if encoder is None:
        return None
    if not any(note or results for note, results in cohort.texts):
        raise InputError(
            f"{model.name} reads texts, but the shards of {spec.name} have none; extract a task of "
            "admissions with their notes"
        )
    return Texts(cohort, encoder, spec)


def cuts(
    cohort: Cohort, texts: Texts | None, train: TrainConfig, share: int, pixels: int
) -> list[tuple[Cut, Rows]]:
    """The ways to cut a worker's share of a step, each with an unlucky micro-batch of it."""
    if texts is not None and train.tokens_per_pass is not None:
        return list(texts.cuts(share, train.tokens_per_pass))
    found = accumulations(share, train.accumulation)
    if texts is None:
        return [(cut, cohort.micro(cut.rows, pixels)) for cut in found]
    return [(cut, texts.longest(cut.rows)) for cut in found]


def accumulations(share: int, own: int = 1) -> list[Cut]:
    """A share in even micro-batches: each size once, by the fewest that have it at most."""
    found: dict[int, Cut] = {}
    for count in sorted({own, *ACCUMULATIONS, share}):
        if count <= share:
            rows = -(-share // count)
            found.setdefault(rows, Cut(count, rows, f"train.accumulation={count}"))
    return list(found.values()) or [Cut(1, 1, "train.accumulation=1")]


def read_cohort(config: RunConfig, spec: TaskSpec) -> Cohort:
    """What the manifest and the shards say of the training split.

    Raises:
        InputError: There are no finished shards, or no training rows.
    """
    folder, batches = config.data.shards, config.data.batches
    manifest = Manifest.load(folder)
    overlap = manifest.overlap.get("train", {})
    rows, paired = manifest.splits.get("train", 0), overlap.get("cxr", 0)
    if batches.train_rows == "paired":
        rows = paired
    elif spec.unit == "stay":
        rows = paired + round(batches.unpaired_fraction * (rows - paired))
    if not rows:
        raise InputError(f"{folder}: no training rows to plan for; extract more subjects")
    clinical = spec.unit == "admission"
    return Cohort(
        rows,
        min(1.0, paired / rows) * (1 - batches.withhold_cxr),
        _series_lengths(folder, manifest, batches.max_steps),
        sum((folder / file.name).stat().st_size for file in manifest.files),
        _texts(folder, manifest) if clinical else (),
        batches.labs.top if clinical else 0,
    )


def _series_lengths(folder: Path, manifest: Manifest, most: int | None) -> np.ndarray:
    """[N] sorted, of the first rows."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    lengths: list[np.ndarray] = []
    for file in manifest.files:
        values = pq.read_table(folder / file.name, columns=["ehr_observed"])["ehr_observed"]
        counts = pc.fill_null(pc.list_value_length(values), 0).to_numpy()
        lengths.append(np.maximum(counts // N_CHANNELS, 1))
        if sum(map(len, lengths)) >= SAMPLED_ROWS:
            break
    sample = np.sort(np.concatenate(lengths))
    return sample if most is None else np.minimum(sample, most)


def _texts(folder: Path, manifest: Manifest) -> tuple[tuple[str, str], ...]:
    """Notes and results of the first training rows."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    texts: list[tuple[str, str]] = []
    for file in manifest.files:
        table = pq.read_table(
            folder / file.name, columns=["notes", "lab_text"], filters=pc.field("split") == "train"
        )
        pairs = zip(table["notes"].to_pylist(), table["lab_text"].to_pylist(), strict=True)
        texts += [(note or "", results or "") for note, results in pairs]
        if len(texts) >= SAMPLED_TEXTS:
            break
    return tuple(texts[:SAMPLED_TEXTS])


def _spread(sample: int, count: int) -> np.ndarray:
    """[count] places in a sorted sample of that size: even quantiles, the last one its end."""
    quantiles = (np.arange(count) + 0.5) / count
    places = np.quantile(np.arange(sample), quantiles, method="nearest").astype(int)
    places[-1] = sample - 1
    return places
