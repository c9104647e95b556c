"""What is planted where: each label's kind, its two latents, and its probability given them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from data.tasks import CHEXPERT_LABELS, PHENOTYPES

if TYPE_CHECKING:
    from data.sources.synthetic.config import HospitalConfig

Kind = Literal["ehr", "cxr", "both", "xor", "neither"]
LATENTS = ("e1", "e2", "i1", "i2")
MORTALITY = "In-hospital mortality"


@dataclass(frozen=True)
class Planted:
    """One label: its kind, the latents it reads and the base rate where it reads none.

    `ehr` and `cxr` are columns of LATENTS (0..1 and 2..3); both are given for every kind, and a
    kind that does not use one has a table constant in it.
    """

    name: str
    kind: Kind
    ehr: int
    cxr: int
    base: float = 0.3

    def table(self, config: HospitalConfig) -> np.ndarray:
        """P(label | e, i): float64 [2, 2], first index the temporal latent."""
        e, i = np.meshgrid([0, 1], [0, 1], indexing="ij")
        if self.kind == "ehr":
            return np.asarray(config.single_label)[e]
        if self.kind == "cxr":
            return np.asarray(config.single_label)[i]
        if self.kind == "xor":
            return np.asarray(config.xor_label)[e ^ i]
        if self.kind == "both":
            levels = config.mortality if self.name == MORTALITY else config.both_label
            return np.asarray(levels)[e + i]
        return np.full((2, 2), self.base)


_KINDS: tuple[tuple[Kind, int, int, float], ...] = (
    ("ehr", 0, 2, 0.3),  # acute renal failure
    ("neither", 0, 2, 0.15),  # cerebrovascular
    ("both", 1, 3, 0.3),  # myocardial infarction
    ("ehr", 0, 2, 0.3),  # dysrhythmias
    ("both", 1, 2, 0.3),  # chronic kidney disease
    ("cxr", 0, 3, 0.3),  # COPD
    ("cxr", 0, 2, 0.3),  # complications
    ("cxr", 0, 2, 0.3),  # conduction disorders
    ("both", 0, 3, 0.3),  # heart failure
    ("cxr", 0, 3, 0.3),  # coronary atherosclerosis
    ("ehr", 1, 2, 0.3),  # diabetes with complications
    ("neither", 0, 2, 0.2),  # diabetes without
    ("neither", 0, 2, 0.4),  # lipids
    ("neither", 0, 2, 0.4),  # essential hypertension
    ("ehr", 1, 2, 0.3),  # fluid and electrolytes
    ("ehr", 1, 2, 0.3),  # gastrointestinal haemorrhage
    ("neither", 0, 2, 0.2),  # hypertension with complications
    ("both", 0, 2, 0.3),  # other liver diseases
    ("cxr", 0, 3, 0.3),  # other lower respiratory disease
    ("xor", 0, 2, 0.3),  # other upper respiratory disease
    ("cxr", 0, 2, 0.3),  # pleurisy, pneumothorax, collapse
    ("both", 0, 2, 0.3),  # pneumonia
    ("both", 1, 3, 0.3),  # respiratory failure
    ("ehr", 0, 2, 0.3),  # septicaemia
    ("ehr", 1, 2, 0.3),  # shock
)

PLANTED: tuple[Planted, ...] = (
    *(
        Planted(name, kind, ehr, cxr, base)
        for (name, _), (kind, ehr, cxr, base) in zip(PHENOTYPES, _KINDS, strict=True)
    ),
    Planted(MORTALITY, "both", 1, 3),
)
"""The 25 phenotypes in the benchmark's order, then mortality."""

# CheXpert findings: the image latent that each reads (2 or 3), or None for a base rate.
FINDINGS: tuple[tuple[str, int | None], ...] = tuple(
    zip(CHEXPERT_LABELS, (2, 3, 2, 3, None, None, 2, 3, None, 2, None, 2, 3, None), strict=True)
)


def tables(config: HospitalConfig) -> np.ndarray:
    """P(label | e, i) of all planted labels: float64 [26, 2, 2]."""
    return np.stack([label.table(config) for label in PLANTED])


def draw(latents: np.ndarray, config: HospitalConfig, rng: np.random.Generator) -> np.ndarray:
    """Labels given latents (uint8 [n, 4]): uint8 [n, 26], independent given the latents."""
    return (rng.random((len(latents), len(PLANTED))) < oracle(latents, config)).astype(np.uint8)


def oracle(latents: np.ndarray, config: HospitalConfig) -> np.ndarray:
    """P(label | latents) for uint8 [n, 4]: float64 [n, 26]."""
    return bayes(latents.astype(np.float64), config)


def bayes(beliefs: np.ndarray, config: HospitalConfig) -> np.ndarray:
    """P(label | features) from P(latent on | features), float64 [n, 4]: float64 [n, 26].

    The latents are independent and so are the features that show them, hence the joint belief is
    the product; 0.5 stands for a modality that was not seen.
    """
    found = np.empty((len(beliefs), len(PLANTED)))
    for column, (label, table) in enumerate(zip(PLANTED, tables(config), strict=True)):
        e, i = beliefs[:, label.ehr], beliefs[:, label.cxr]
        off = (1 - i) * table[0, 0] + i * table[0, 1]
        on = (1 - i) * table[1, 0] + i * table[1, 1]
        found[:, column] = (1 - e) * off + e * on
    return found


def findings(latents: np.ndarray, config: HospitalConfig, rng: np.random.Generator) -> np.ndarray:
    """CheXpert labels of images given their latents (uint8 [n, 4]): float32 [n, 14], 1 or 0."""
    low, high = config.single_label
    chance = np.full((len(latents), len(FINDINGS)), 0.2)
    for column, (_, latent) in enumerate(FINDINGS):
        if latent is not None:
            chance[:, column] = np.where(latents[:, latent] == 1, high, low)
    return (rng.random(chance.shape) < chance).astype(np.float32)
