"""The hourly course of the vital signs, the two motifs in it, and what they tell of the latents.

A motif is two phases of equal length at a uniformly random time well before the end. Latent e1
decides whether heart rate and temperature rise in the first phase and breathing rate and glucose
in the second, or the other way round; latent e2 whether the pressures dip before the saturation or
after it. Either way every channel moves once, as far and as long, so its mean and its last value
say nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import logsumexp

from data.sources.synthetic.people import onset_limit

if TYPE_CHECKING:
    from data.sources.synthetic.config import HospitalConfig
    from data.sources.synthetic.people import Block


@dataclass(frozen=True)
class Vital:
    """A channel that is charted hourly: population mean, spread over patients, hourly noise."""

    name: str
    mean: float
    spread: float
    noise: float
    decimals: int = 0


VITALS: tuple[Vital, ...] = (
    Vital("Heart Rate", 86.0, 9.0, 4.0),
    Vital("Respiratory rate", 19.0, 2.5, 1.5),
    Vital("Systolic blood pressure", 122.0, 11.0, 5.0),
    Vital("Diastolic blood pressure", 64.0, 7.0, 3.5),
    Vital("Mean blood pressure", 80.0, 8.0, 4.0),
    Vital("Oxygen saturation", 96.0, 1.0, 0.8),
    Vital("Temperature", 37.0, 0.4, 0.2, 1),
    Vital("Glucose", 128.0, 16.0, 10.0),
)


@dataclass(frozen=True)
class Course:
    """Every hour of every stay of a block, flat: stay index, hour, values, and whether charted."""

    stay: np.ndarray  # int64 [H]
    hour: np.ndarray  # int64 [H]
    values: np.ndarray  # float64 [H, 8], as VITALS
    charted: np.ndarray  # bool [H, 8]


def motif(name: str, on: np.ndarray, step: np.ndarray, config: HospitalConfig) -> np.ndarray:
    """A channel's motif at `step` hours after its onset, for latents `on` (0 or 1)."""
    phase = config.motif_phase_hours
    first = (step >= 0) & (step < phase)
    second = (step >= phase) & (step < 2 * phase)
    latent = latent_of(name, config)
    leads = name in config.leading[latent]
    height = (config.leading if leads else config.following)[latent][name]
    return height * np.where((on == 1) == leads, first, second)


def latent_of(name: str, config: HospitalConfig) -> int:
    """0 where a channel shows e1, 1 where it shows e2."""
    return 0 if name in config.leading[0] or name in config.following[0] else 1


def draw_course(block: Block, config: HospitalConfig, rng: np.random.Generator) -> Course:
    """The clean hourly values of a block's stays, and which of them are charted."""
    count = np.maximum(np.floor(block.hours).astype(np.int64), 1)
    stay = np.repeat(np.arange(len(count)), count)
    hour = np.arange(len(stay)) - np.repeat(np.cumsum(count) - count, count)
    admission = block.stay_admission
    acuity = block.acuity[admission]
    rate = np.clip(config.charting_rate + config.acuity_on_charting * acuity, 0.5, 0.98)
    values = np.empty((len(stay), len(VITALS)))
    for column, vital in enumerate(VITALS):
        level = rng.normal(vital.mean, vital.spread, len(count))
        latent = latent_of(vital.name, config)
        onset = block.onset[:, latent]
        step = np.where(onset[stay] >= 0, hour - onset[stay], -1)
        on = block.latents[admission, latent][stay]
        noise = rng.normal(0.0, vital.noise, len(stay))
        values[:, column] = level[stay] + noise + motif(vital.name, on, step, config)
    charted = rng.random(values.shape) < rate[stay, None]
    return Course(stay, hour, values, charted)


def beliefs(block: Block, course: Course, config: HospitalConfig) -> np.ndarray:
    """P(e1 on | clean charted values), P(e2 on | ...) of each stay: float64 [S, 2].

    Exact under the generative model, with the stay's level (normal) integrated out and the onset
    (uniform) summed out: for a channel with observed residuals r and motif m the log-likelihood
    ratio to no motif is m'V^-1 r - m'V^-1 m / 2, V = noise^2 I + spread^2 11'.
    """
    hours = config.motif_last_hour
    early = course.hour < hours
    stay, hour = course.stay[early], course.hour[early]
    seen = np.zeros((len(VITALS), len(block.stay), hours))
    rest = np.zeros_like(seen)
    for column, vital in enumerate(VITALS):
        mask = course.charted[early, column]
        seen[column, stay[mask], hour[mask]] = 1.0
        rest[column, stay[mask], hour[mask]] = course.values[early, column][mask] - vital.mean
    limit = onset_limit(block.hours, config)
    starts = np.arange(config.motif_first_hour, hours - 2 * config.motif_phase_hours + 1)
    allowed = np.where(starts[None, :] <= limit[:, None], 0.0, -np.inf)
    found = np.full((len(block.stay), 2), 0.5)
    shown = limit >= config.motif_first_hour
    step = np.arange(hours)[None, :] - starts[:, None]
    for latent in range(2):
        score = np.zeros((2, *allowed.shape))
        for column, vital in enumerate(VITALS):
            if latent_of(vital.name, config) != latent:
                continue
            for on in range(2):
                shape = motif(vital.name, np.array(on), step, config)
                score[on] += _log_ratio(seen[column], rest[column], shape, vital)
        with np.errstate(invalid="ignore"):
            off, lit = (logsumexp(score[on][shown] + allowed[shown], axis=1) for on in range(2))
        found[shown, latent] = 1.0 / (1.0 + np.exp(np.clip(off - lit, -700, 700)))
    return found


def _log_ratio(seen: np.ndarray, rest: np.ndarray, shape: np.ndarray, vital: Vital) -> np.ndarray:
    """Log-likelihood ratio of each onset's motif [K, T] in each stay [S, T]: float64 [S, K]."""
    precision = 1.0 / vital.noise**2
    count = seen.sum(1, keepdims=True)
    shrink = precision**2 / (1.0 / vital.spread**2 + count * precision)
    sum_m = seen @ shape.T
    sum_r = rest.sum(1, keepdims=True)
    cross = precision * (rest @ shape.T) - shrink * sum_r * sum_m
    square = precision * (seen @ (shape**2).T) - shrink * sum_m**2
    return cross - 0.5 * square
