"""Diagnosis codes of the planted labels, chosen so that every published ICD rule agrees on them.

Under `CODES` a code's ICD-9 group, the forward GEM and the backward GEM all name the same CCS
group. The `COMPANIONS` are codes on which rules differ or that a map misses; each stands only
beside an agreed code of its label, so the planted labels hold under every rule but the naive one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from data.sources.synthetic.people import Block

# For each phenotype in the benchmark's order: ICD-9 codes, ICD-10 codes.
CODES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("5849", "5845"), ("N179", "N170")),
    (("43491", "431"), ("I609", "I619")),
    (("41071", "41001"), ("I2109", "I2119")),
    (("42731", "4271"), ("I4891", "I472")),
    (("5853", "5859"), ("N183", "N184")),
    (("496", "49121"), ("J439", "J410")),
    (("99859", "9974"), ("J95811", "I9581")),
    (("4260", "4263"), ("I442", "I447")),
    (("4280", "42823"), ("I509", "I501")),
    (("41401", "412"), ("I252", "I209")),
    (("25060", "25040"), ("E1310", "E1300")),
    (("25000", "25001"), ("E119", "E109")),
    (("2724", "2720"), ("E785", "E781")),
    (("4019", "4011"), ("I169",)),
    (("2761", "2762"), ("E871", "E876")),
    (("5789", "53100"), ("K254", "K264")),
    (("40390", "40300"), ("I129", "I119")),
    (("5715", "5723"), ("K766", "K769")),
    (("51889", "515"), ("J8489", "J811")),
    (("4781", "470"), ("J342", "J339")),
    (("5119", "5128"), ("J939", "J942")),
    (("486", "4829"), ("J189", "J159")),
    (("51881", "51883"), ("J9600", "J9690")),
    (("0389", "99591"), ("I76", "R6520")),
    (("78551", "78559"), ("R579", "R570")),
)
# ICD-10 codes on which maps differ: the code, and the phenotypes that must all be present.
COMPANIONS: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("I2510", (9,)),  # several targets in several groups
    ("J9601", (22,)),  # in the backward GEM only
    ("R6521", (23, 24)),  # a combination: septicaemia and shock
)
OTHER_9 = ("53081", "V1582", "311", "2859", "2449", "V5861", "E8490")
OTHER_10 = ("K219", "Z87891", "F329", "D649", "E039", "Z7901", "E890")

# Diagnoses that no phenotype knows: valvular disease, and a neurological disorder.
EXTRA: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("4240", "4241"), ("I340", "I350")),
    (("3320", "340"), ("G20", "G35")),
)

TITLES_VERSION = tuple(
    [(c, 9) for nine, _ in CODES for c in nine]
    + [(c, 9) for c in OTHER_9]
    + [(c, 10) for _, ten in CODES for c in ten]
    + [(c, 10) for c, _ in COMPANIONS]
    + [(c, 10) for c in OTHER_10]
    + [(c, 9) for nine, _ in EXTRA for c in nine]
    + [(c, 10) for _, ten in EXTRA for c in ten]
)


def draw_diagnoses(
    block: Block,
    rng: np.random.Generator,
    extra_labels: np.ndarray,
    *,
    nine_only: bool,
    quirks: bool,
) -> dict[str, np.ndarray]:
    """Rows of the diagnosis table: admission (index), seq_num, code, version.

    `extra_labels` (uint8 [A, 2]) says which admissions have a diagnosis of EXTRA.

    An admission is coded in one version throughout. With quirks one admission in fifty has no
    diagnosis at all, and companions and repeated codes appear.
    """
    rows: list[tuple[int, int, str, int]] = []
    for admission in range(len(block.hadm)):
        version = 9 if nine_only or rng.random() < 0.6 else 10
        silent = rng.random() < 0.02
        present = np.flatnonzero(block.labels[admission, : len(CODES)])
        chosen = [_pick(CODES[k][version // 10], rng) for k in present]
        other = OTHER_9 if version == 9 else OTHER_10
        extra = [str(c) for c in rng.choice(other, size=int(rng.integers(1, 5)), replace=False)]
        if quirks and version == 10:
            held = set(present.tolist())
            for code, needs in COMPANIONS:
                if rng.random() < 0.5 and held.issuperset(needs):
                    extra.append(code)
        if quirks and chosen and rng.random() < 0.05:
            extra.append(chosen[0])
        more = np.flatnonzero(extra_labels[admission])
        listed = [*chosen, *extra, *(_pick(EXTRA[k][version // 10], rng) for k in more)]
        if quirks and silent:
            continue
        order = rng.permutation(len(listed))
        rows += [(admission, seq + 1, listed[k], version) for seq, k in enumerate(order)]
    columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
    names = ("admission", "seq_num", "code", "version")
    kinds = (np.int64, np.int64, np.str_, np.int64)
    return {n: np.asarray(c, dtype=k) for n, c, k in zip(names, columns, kinds, strict=True)}


def _pick(codes: tuple[str, ...], rng: np.random.Generator) -> str:
    return codes[int(rng.integers(len(codes)))]
