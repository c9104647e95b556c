"""What is true of a synthetic hospital, and the best scores that any model can reach on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from data.files import atomic_path
from data.sources.synthetic.planting import LATENTS, PLANTED, bayes, oracle
from data.sources.synthetic.writer import times

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path
    from types import TracebackType

    from data.sources.synthetic.config import HospitalConfig
    from data.sources.synthetic.people import Block

TRUTH_FILE = "stays.parquet"
MODALITY_SETS: Mapping[str, tuple[int, ...]] = {
    "ehr": (0, 1),
    "cxr": (2, 3),
    "ehr+cxr": (0, 1, 2, 3),
}


class TruthWriter:
    """A file of truth/, written block by block, whole or not at all; by default one row a stay."""

    def __init__(self, root: Path, name: str = TRUTH_FILE) -> None:
        self._context: AbstractContextManager[Path] = atomic_path(root / name)
        self._path: Path | None = None
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> TruthWriter:
        self._path = self._context.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()
        self._context.__exit__(kind, error, trace)

    def append(
        self,
        block: Block,
        belief: np.ndarray,
        paired: np.ndarray,
        config: HospitalConfig,
        subjects: np.ndarray,
    ) -> None:
        """Add the stays of `subjects`; `belief` is float64 [S, 4], 0.5 where nothing was seen."""
        adm = block.stay_admission
        columns: dict[str, object] = {
            "subject_id": block.subject[block.stay_patient],
            "hadm_id": block.hadm[adm],
            "stay_id": block.stay,
            "intime": times(block.intime),
            "hours": block.hours,
            "acuity": block.acuity[adm],
            "paired": paired,
            "motif_e1": block.onset[:, 0],
            "motif_e2": block.onset[:, 1],
        }
        columns |= {f"latent_{name}": block.latents[adm, k] for k, name in enumerate(LATENTS)}
        columns |= {f"belief_{name}": belief[:, k] for k, name in enumerate(LATENTS)}
        chance = oracle(block.latents[adm], config)
        columns |= {f"label_{p.name}": block.labels[adm, k] for k, p in enumerate(PLANTED)}
        columns |= {f"oracle_{p.name}": chance[:, k] for k, p in enumerate(PLANTED)}
        self.write(pl.DataFrame(columns), subjects)

    def write(self, frame: pl.DataFrame, subjects: np.ndarray) -> None:
        """Add the rows of `subjects`."""
        table = frame.filter(pl.col("subject_id").is_in(subjects.tolist())).to_arrow()
        if self._writer is None:
            self._writer = pq.ParquetWriter(str(self._path), table.schema)
        self._writer.write_table(table)


def auroc(truth: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve with ties counted half; NaN where one class is absent."""
    positive, total = int(truth.sum()), len(truth)
    if positive in (0, total):
        return float("nan")
    _, inverse, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2.0)[inverse]
    above = rank[truth == 1].sum() - positive * (positive + 1) / 2.0
    return float(above / (positive * (total - positive)))


def truth_scores(
    out: Path, config: HospitalConfig | None = None, *, stays: Collection[int] | None = None
) -> pl.DataFrame:
    """Oracle and Bayes AUROC of every planted label on the paired stays and on all stays.

    Columns: label, kind, stays, positives, oracle, ehr, cxr, ehr+cxr, late (the mean of the two
    unimodal Bayes scores), all (ehr+cxr on every stay, an absent image counting as unseen).

    The Bayes scores are those of the clean features: the charted hours before rounding and quirks,
    the image before quantisation and JPEG.

    Args:
        out: The folder that `generate` wrote.
        config: Its parameters; default those it was written with.
        stays: Only stays with these ids, e.g. those of a test split.
    """
    settings = config or read_config(out)
    frame = pl.read_parquet(out / "truth" / TRUTH_FILE)
    if stays is not None:
        frame = frame.filter(pl.col("stay_id").is_in(list(stays)))
    belief = frame.select(f"belief_{name}" for name in LATENTS).to_numpy()
    best = {name: bayes(_restrict(belief, used), settings) for name, used in MODALITY_SETS.items()}
    paired = frame["paired"].to_numpy()
    rows = []
    for k, label in enumerate(PLANTED):
        truth = frame[f"label_{label.name}"].to_numpy()
        here = truth[paired]
        ideal = frame[f"oracle_{label.name}"].to_numpy()[paired]
        one = {name: score[paired, k].round(9) for name, score in best.items()}
        rows.append(
            {
                "label": label.name,
                "kind": label.kind,
                "stays": int(paired.sum()),
                "positives": int(here.sum()),
                "oracle": auroc(here, ideal.round(9)),
                **{name: auroc(here, score) for name, score in one.items()},
                "late": auroc(here, ((one["ehr"] + one["cxr"]) / 2).round(9)),
                "all": auroc(truth, best["ehr+cxr"][:, k].round(9)),
            }
        )
    return pl.DataFrame(rows)


def _restrict(belief: np.ndarray, used: tuple[int, ...]) -> np.ndarray:
    out = np.full_like(belief, 0.5)
    out[:, list(used)] = belief[:, list(used)]
    return out


def read_config(out: Path) -> HospitalConfig:
    """The parameters a hospital was written with.

    Raises:
        InputError: `out` holds no truth.json.
    """
    import json

    from data.errors import InputError
    from data.sources.synthetic.config import HospitalConfig

    path = out / "truth" / "truth.json"
    if not path.is_file():
        raise InputError(f"{path} is missing; name the folder that `data synth` wrote")
    return HospitalConfig.model_validate(json.loads(path.read_text(encoding="utf-8"))["config"])


def truth_report(out: Path) -> str:
    """A Markdown table of `truth_scores`, for people."""
    scores = truth_scores(out)
    lines = [
        f"Planted truth of {out.name}: AUROC on {scores['stays'][0]} paired stays "
        "(`all`: on every stay). Oracle on the latents, Bayes on each modality set's "
        "clean features, `late` averaging the two unimodal Bayes scores.",
        "",
        "| label | kind | positives | oracle | ehr | cxr | ehr+cxr | late | all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    names = ("oracle", "ehr", "cxr", "ehr+cxr", "late", "all")
    for row in scores.sort("kind", maintain_order=True).iter_rows(named=True):
        figures = " | ".join(f"{row[name]:.3f}" for name in names)
        lines.append(f"| {row['label']} | {row['kind']} | {row['positives']} | {figures} |")
    return "\n".join(lines) + "\n"
