"""What notes and labs say of the latents, and the best that any model can make of it.

Notes show e2, i1 and i2 by the order of two events and by which of two symptoms is denied: whatever
the latent, a note holds the same words. Labs show e1 and e2 by whether two tests are moved to the
same side or to opposite ones: whatever the latent, each test is as often high as low. So e1 is
specific to labs, i1 and i2 to notes, e2 is shared; a third pair in each is noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from data.code_lists import shipped
from data.sources.synthetic import items
from data.sources.synthetic.codes import CODES, EXTRA
from data.sources.synthetic.planting import LATENTS, PLANTED, tables
from data.sources.synthetic.truth import auroc
from data.tasks import ELIXHAUSER_LABELS

if TYPE_CHECKING:
    from pathlib import Path

    from data.sources.synthetic.config import HospitalConfig
    from data.sources.synthetic.people import Block

ADMISSIONS_FILE: Final = "admissions.parquet"
IN_NOTES: Final = (1, 2, 3)
"""Columns of LATENTS."""
IN_LABS: Final = (0, 1)
MODALITY_SETS: Final = ("notes", "labs", "notes+labs")
_PAIRS: Final = ((0, ("Sodium", "Potassium")), (1, ("Hemoglobin", "White Blood Cells")))
NOISE_PAIR: Final = ("Creatinine", "Urea Nitrogen")
"""Moved to sides that say nothing of the latents; `renal_coupling` ties them to one another."""
_LAB: Final = {item.label: k for k, item in enumerate(items.LABS)}
_NINE_SHARE: Final = 0.6
"""Share of MIMIC-IV's admissions that are coded in ICD-9."""


@dataclass(frozen=True)
class Clinical:
    """What a block's notes and labs are made with, one row an admission.

    Attributes:
        extra: [A, 2] uint8: valvular disease, and a neurological disorder.
        side: [A, n labs] int8: the side (-1, 0, +1) to which each test is moved.
        noise: [A] bool: which symptom the meaningless sentence denies.
    """

    extra: np.ndarray
    side: np.ndarray
    noise: np.ndarray


def draw_clinical(block: Block, config: HospitalConfig, rng: np.random.Generator) -> Clinical:
    """Sides of tests, and the two diagnoses that only tasks of admissions know."""
    n = len(block.hadm)
    latents = block.latents.astype(np.int8)
    side = np.zeros((n, len(items.LABS)), np.int8)
    for latent, (one, other) in _PAIRS:
        sign = rng.choice(np.array([-1, 1], np.int8), n)
        side[:, _LAB[one]] = sign
        side[:, _LAB[other]] = np.where(latents[:, latent] == 1, sign, -sign)
    creatinine, urea = (_LAB[name] for name in NOISE_PAIR)
    for test in (creatinine, urea):
        side[:, test] = rng.choice(np.array([-1, 1], np.int8), n)
    # A stream of its own, so that the coupling moves nothing else.
    follows = rng.spawn(1)[0].random(n) < config.renal_coupling
    side[follows, urea] = side[follows, creatinine]
    chance = _extra_chance(latents, config)
    extra = (rng.random((n, 2)) < chance).astype(np.uint8)
    return Clinical(extra, side, rng.random(n) < 0.5)


def _extra_chance(latents: np.ndarray, config: HospitalConfig) -> np.ndarray:
    """[n, 2]: valvular disease where e1 and i1 differ, the neurological one at a base rate."""
    differ = latents[:, 0] != latents[:, 2]
    low, high = config.xor_label
    return np.stack([np.where(differ, high, low), np.full(len(latents), 0.15)], axis=1)


def present_illness(latents: np.ndarray, noise: bool, rng: np.random.Generator) -> str:
    """The sentences that show i1 (order) and i2 (negation), and one that shows nothing."""
    first, then = ("cough", "fever") if latents[2] else ("fever", "cough")
    denied, reported = (
        ("chest pain", "leg swelling") if latents[3] else ("leg swelling", "chest pain")
    )
    absent, there = ("headache", "dizziness") if noise else ("dizziness", "headache")
    sentences = [
        (f"The {first} came before the {then}.", f"First there was {first}, and then {then}.")[
            int(rng.integers(2))
        ],
        f"The patient denies {denied} but reports {reported}.",
        f"There is no {absent}, yet there is {there}.",
    ]
    return " ".join(sentences[k] for k in rng.permutation(len(sentences)))


def medication_change(latents: np.ndarray) -> str:
    """The sentence that shows e2 by its order."""
    stopped, started = ("digoxin", "amiodarone") if latents[1] else ("amiodarone", "digoxin")
    return f"{stopped} was stopped before {started} was started".capitalize() + "."


def lab_beliefs(evidence: np.ndarray, config: HospitalConfig) -> np.ndarray:
    """P(latent on | labs) for LATENTS: float64 [A, 4], 0.5 for what labs do not show.

    Args:
        evidence: [A, n labs], the sum over an admission's results of (value - mean) / spread. With
            results N(+-s, 1) the log odds of the upper side are 2 s times it.
        config: `lab_shift` is s.
    """
    upper = 1 / (1 + np.exp(-np.clip(2 * config.lab_shift * evidence, -500, 500)))
    found = np.full((len(evidence), 4), 0.5)
    for latent, (one, other) in _PAIRS:
        p, q = upper[:, _LAB[one]], upper[:, _LAB[other]]
        found[:, latent] = p * q + (1 - p) * (1 - q)
    return found


def note_beliefs(block: Block, noted: np.ndarray) -> np.ndarray:
    """P(latent on | note): sure where an admission has a note and 0.5 elsewhere; [A, 4]."""
    found = np.full((len(block.hadm), 4), 0.5)
    for latent in IN_NOTES:
        found[:, latent] = np.where(noted, block.latents[:, latent], 0.5)
    return found


def joint_beliefs(notes: np.ndarray, labs: np.ndarray) -> np.ndarray:
    """The belief after both, which are independent given the latents: float64 [A, 4]."""
    on, off = notes * labs, (1 - notes) * (1 - labs)
    return np.where(on + off > 0, on / np.maximum(on + off, 1e-300), notes)


def label_chances(config: HospitalConfig, *, nine_share: float) -> np.ndarray:
    """P(Elixhauser label | latents): float64 [16, 10], the row's bits are e1, e2, i1, i2.

    A label stands where any drawn code has it: phenotypes and extra diagnoses are independent given
    the latents, and so are the codes chosen for them.
    """
    planted = tables(config)[: len(CODES)]
    combos = np.array([[(row >> bit) & 1 for bit in range(4)] for row in range(16)])
    chance = np.stack(
        [
            planted[k][combos[:, label.ehr], combos[:, label.cxr]]
            for k, label in enumerate(PLANTED[: len(CODES)])
        ],
        axis=1,
    )
    chance = np.concatenate([chance, _extra_chance(combos, config)], axis=1)
    mixed = np.zeros((16, len(ELIXHAUSER_LABELS)))
    for version, share in ((9, nine_share), (10, 1 - nine_share)):
        none = np.ones_like(mixed)
        for k, by_version in enumerate((*CODES, *EXTRA)):
            codes = by_version[version // 10]
            for label in range(len(ELIXHAUSER_LABELS)):
                with_it = [label in shipped("elixhauser").of_codes(version, code) for code in codes]
                none[:, label] *= 1 - chance[:, k] * np.mean(with_it)
        mixed += share * (1 - none)
    return mixed


def expected_labels(beliefs: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """P(label | beliefs in the four latents): float64 [n, 10]."""
    weights = np.ones((len(beliefs), 16))
    for row in range(16):
        for bit in range(4):
            p = beliefs[:, bit]
            weights[:, row] *= p if (row >> bit) & 1 else 1 - p
    return weights @ chances


def truth_rows(
    block: Block, coded: dict[str, np.ndarray], beliefs: dict[str, np.ndarray], noted: np.ndarray
) -> pl.DataFrame:
    """One row an admission: latents, beliefs after notes and after labs, labels as coded."""
    lists = shipped("elixhauser")
    labels = np.zeros((len(block.hadm), len(ELIXHAUSER_LABELS)), np.uint8)
    for admission, code, version in zip(
        coded["admission"], coded["code"], coded["version"], strict=True
    ):
        labels[admission, list(lists.of_codes(int(version), str(code)))] = 1
    columns: dict[str, object] = {
        "subject_id": block.subject[block.adm_patient],
        "hadm_id": block.hadm,
        "noted": noted,
        "coded": np.isin(np.arange(len(block.hadm)), coded["admission"]),
    }
    columns |= {f"latent_{name}": block.latents[:, k] for k, name in enumerate(LATENTS)}
    for modality, belief in beliefs.items():
        columns |= {f"{modality}_{name}": belief[:, k] for k, name in enumerate(LATENTS)}
    columns |= {f"label_{name}": labels[:, k] for k, name in enumerate(ELIXHAUSER_LABELS)}
    return pl.DataFrame(columns)


def admission_scores(out: Path, *, hadm_ids: list[int] | None = None) -> pl.DataFrame:
    """AUROC of the ten Elixhauser labels: oracle on the latents, Bayes on notes, labs and both.

    Columns: label, positives, oracle, notes, labs, notes+labs; over admissions with a diagnosis.

    Args:
        out: The folder that `generate` wrote.
        hadm_ids: Only these admissions, e.g. those of a test split.

    Raises:
        InputError: `out` holds no truth.
    """
    import json

    from data.sources.synthetic.truth import read_config

    config = read_config(out)
    about = json.loads((out / "truth" / "truth.json").read_text(encoding="utf-8"))
    nine = 1.0 if str(about["release"]).startswith("mimic-iii") else _NINE_SHARE
    frame = pl.read_parquet(out / "truth" / ADMISSIONS_FILE).filter("coded")
    if hadm_ids is not None:
        frame = frame.filter(pl.col("hadm_id").is_in(hadm_ids))
    chances = label_chances(config, nine_share=nine)
    belief = {
        name: frame.select(f"{name}_{latent}" for latent in LATENTS).to_numpy().astype(float)
        for name in ("latent", "notes", "labs")
    }
    belief["notes+labs"] = joint_beliefs(belief["notes"], belief["labs"])
    score = {name: expected_labels(found, chances).round(9) for name, found in belief.items()}
    rows = []
    for k, label in enumerate(ELIXHAUSER_LABELS):
        truth = frame[f"label_{label}"].to_numpy()
        best = {name: auroc(truth, score[name][:, k]) for name in MODALITY_SETS}
        oracle = auroc(truth, score["latent"][:, k])
        rows.append({"label": label, "positives": int(truth.sum()), "oracle": oracle, **best})
    return pl.DataFrame(rows)
