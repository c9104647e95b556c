"""A block of patients: their admissions, ICU stays, latents, labels and deaths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data.sources.synthetic import planting

if TYPE_CHECKING:
    from data.sources.synthetic.config import HospitalConfig

DAY = 86_400
HOUR = 3_600
MEAN_HOURS = 64.0
_EPOCH_2110 = int(np.datetime64("2110-01-01", "s").astype(np.int64))
_COPRIME = 7_919
_MODULUS = 9_999_991


def scatter_ids(index: np.ndarray, base: int, seed: int) -> np.ndarray:
    """Distinct ids in no order, a bijection of the index below 9,999,991 (a prime)."""
    return base + (index.astype(np.int64) * _COPRIME + seed * 104_729) % _MODULUS


@dataclass(frozen=True)
class Block:
    """Patients, admissions and stays of one block; times in seconds since 1970.

    `adm_*` have one entry an admission and point at patients; `stay_*` one a stay and point at
    admissions. Rows are in the order of patients.
    """

    subject: np.ndarray
    male: np.ndarray
    birth_age: np.ndarray  # age at the first admission
    adm_patient: np.ndarray
    hadm: np.ndarray
    admit: np.ndarray
    discharge: np.ndarray
    acuity: np.ndarray
    latents: np.ndarray  # [A, 4]
    labels: np.ndarray  # [A, 26]
    died: np.ndarray
    death_after: np.ndarray  # seconds from discharge to a later death; 0 = none, per patient
    stay_admission: np.ndarray
    stay: np.ndarray
    intime: np.ndarray
    outtime: np.ndarray
    transferred: np.ndarray
    careunit: np.ndarray
    onset: np.ndarray  # [S, 2], first hour of each motif, -1 where the stay is too short

    @property
    def hours(self) -> np.ndarray:
        """Length of each stay in hours, float64 [S]."""
        return (self.outtime - self.intime) / HOUR

    @property
    def stay_patient(self) -> np.ndarray:
        """The patient of each stay, int64 [S]."""
        return self.adm_patient[self.stay_admission]


def _admissions(
    patients: int, config: HospitalConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The patient of each admission, its latents [A, 4] and labels [A, 26]; none after a death."""
    count = rng.choice([1, 2, 3], size=patients, p=[0.7, 0.22, 0.08])
    patient = np.repeat(np.arange(patients), count)
    latents = rng.integers(0, 2, size=(len(patient), 4)).astype(np.uint8)
    labels = planting.draw(latents, config, rng)
    died = labels[:, -1] == 1
    first = np.r_[True, patient[1:] != patient[:-1]]
    deaths = np.cumsum(died) - died
    before = deaths - np.repeat(deaths[first], count)
    kept = before == 0
    return patient[kept], latents[kept], labels[kept]


def onsets(hours: np.ndarray, config: HospitalConfig, rng: np.random.Generator) -> np.ndarray:
    """A uniform first hour for each of the two motifs: int64 [S, 2], -1 where none fits."""
    last = onset_limit(hours, config)[:, None]
    first = config.motif_first_hour
    drawn = first + np.floor(rng.random((len(hours), 2)) * (last - first + 1)).astype(np.int64)
    return np.where(last >= first, drawn, -1)


def onset_limit(hours: np.ndarray, config: HospitalConfig) -> np.ndarray:
    """The last hour at which a motif may start in stays of these lengths: int64 [S]."""
    end = np.minimum(np.floor(hours).astype(np.int64) - 2, config.motif_last_hour)
    return end - 2 * config.motif_phase_hours


def _admission_times(
    patient: np.ndarray, length: np.ndarray, patients: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Begin and end of each admission of `length` hours, in seconds since 1970, one by one."""
    n = len(patient)
    start = _EPOCH_2110 + rng.integers(0, 90 * 365, patients) * DAY
    between = rng.uniform(25.0, 400.0, n) * DAY
    first = np.r_[True, patient[1:] != patient[:-1]]
    run = np.cumsum(length * HOUR + between)
    run = run - length * HOUR
    origin = np.repeat(run[first], np.diff(np.r_[np.flatnonzero(first), n]))
    admit = (start[patient] + run - origin).astype(np.int64)
    admit += (rng.random(n) * DAY).astype(np.int64) // 60 * 60
    discharge = admit + (length * HOUR).astype(np.int64) // 60 * 60
    return admit, discharge


def _ages(patients: int, config: HospitalConfig, rng: np.random.Generator) -> np.ndarray:
    """Whole years at the first admission: adults, a few minors, a few over 89."""
    age = np.clip(rng.normal(64, 16, patients), 18, 89).astype(np.int64)
    draw = rng.random(patients)
    age = np.where(draw < config.minor_rate, rng.integers(1, 18, patients), age)
    old = draw > 1 - config.old_rate
    return np.where(old, rng.integers(90, 97, patients), age)


def draw_block(block: int, seed: int, config: HospitalConfig, rng: np.random.Generator) -> Block:
    """The people of block number `block` of the hospital with that seed."""
    patients = config.patients_per_block
    index = block * patients + np.arange(patients)
    patient, latents, labels = _admissions(patients, config, rng)
    n = len(patient)
    acuity = rng.standard_normal(n)
    hours = 30.0 + rng.gamma(1.6, 22.0, n) * np.exp(0.15 * acuity)
    short = rng.random(n) < config.short_stay_rate
    hours = np.where(short, rng.uniform(4.0, 13.5, n), np.minimum(hours, 400.0))
    before = rng.uniform(0.2, 30.0, n)
    after = rng.uniform(1.0, 120.0, n)
    died = labels[:, -1] == 1
    after = np.where(died, rng.uniform(0.0, 12.0, n), after)
    doubled = rng.random(n) < config.admission_quirk_rate
    second = np.where(doubled, rng.uniform(20.0, 60.0, n), 0.0)
    gap = np.where(doubled, rng.uniform(3.0, 40.0, n), 0.0)
    length = before + hours + gap + second + after
    admit, discharge = _admission_times(patient, length, patients, rng)
    first = np.r_[True, patient[1:] != patient[:-1]]
    rank = np.arange(n) - np.repeat(np.flatnonzero(first), np.diff(np.r_[np.flatnonzero(first), n]))
    key = index[patient] * 4 + rank

    stay_admission = np.concatenate([np.arange(n), np.flatnonzero(doubled)])
    is_second = np.r_[np.zeros(n, bool), np.ones(int(doubled.sum()), bool)]
    order = np.lexsort((is_second, stay_admission))
    stay_admission, is_second = stay_admission[order], is_second[order]
    a = stay_admission
    offset = np.where(is_second, before[a] + hours[a] + gap[a], before[a])
    span = np.where(is_second, second[a], hours[a])
    intime = admit[a] + (offset * HOUR).astype(np.int64)
    outtime = np.minimum(intime + (span * HOUR).astype(np.int64), discharge[a])
    s = len(a)
    age = _ages(patients, config, rng)
    later = np.where(rng.random(patients) < 0.15, rng.integers(2, 400, patients) * DAY, 0)
    return Block(
        subject=scatter_ids(index, 10_000_000, seed),
        male=rng.random(patients) < 0.55,
        birth_age=age,
        adm_patient=patient,
        hadm=scatter_ids(key, 20_000_000, seed),
        admit=admit,
        discharge=discharge,
        acuity=acuity,
        latents=latents,
        labels=labels,
        died=died,
        death_after=later,
        stay_admission=a,
        stay=scatter_ids(key[a] * 2 + is_second, 30_000_000, seed),
        intime=intime,
        outtime=outtime,
        transferred=rng.random(s) < config.admission_quirk_rate,
        careunit=rng.integers(0, 6, s),
        onset=onsets((outtime - intime) / HOUR, config, rng),
    )
