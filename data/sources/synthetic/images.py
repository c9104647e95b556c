"""Chest images with two local shapes at random places, their tables, and what the shapes tell.

Latent i1 decides whether a patch holds rings or spokes, latent i2 whether another holds a bright
or a dark core. Both members of a pair have the same mean (zero), the same energy and the same
window, and neither changes its kind when the image is flipped, turned or moved.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from scipy import fft
from scipy.special import logsumexp

if TYPE_CHECKING:
    from data.sources.synthetic.config import HospitalConfig

SPOKE_PHASES = 4
_RING_WAVE = 5.0
_SPOKES = 4


def shapes(config: HospitalConfig) -> np.ndarray:
    """The patches, float64 [2 latents, 2 states, SPOKE_PHASES, D, D], D = 2 radius + 1.

    Rings alternate their polarity with the phase; spokes turn with it; cores have one form.
    """
    radius = config.patch_radius
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float64)
    r, angle = np.hypot(x, y), np.arctan2(y, x)
    window = np.clip(radius + 0.5 - r, 0.0, 1.0)
    core = np.where(r < 0.6 * radius, 1.0, -1.0) * window
    out = np.empty((2, 2, SPOKE_PHASES, *r.shape))
    for phase in range(SPOKE_PHASES):
        turn = np.pi * phase / (2 * SPOKE_PHASES)
        spokes = np.sign(np.cos(_SPOKES * (angle + turn))) * window * (r > 1.0)
        rings = (1.0 if phase % 2 else -1.0) * np.sign(np.cos(2 * np.pi * r / _RING_WAVE)) * window
        for latent, state, patch in ((0, 0, spokes), (0, 1, rings), (1, 0, -core), (1, 1, core)):
            flat = (patch - patch[window > 0].mean()) * (window > 0)
            out[latent, state, phase] = flat / np.sqrt((flat**2).sum() / (window > 0).sum())
    return out * config.patch_amplitude * 0.5


def _background(count: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """Two dark lungs in a brighter, unevenly lit chest: float64 [n, G, G].

    Lighting and depth differ from image to image by more than the shapes add to the spread.
    """
    y, x = np.mgrid[0:side, 0:side] / (side - 1.0)
    out = np.full((count, side, side), 0.55)
    out += rng.normal(0.0, 0.03, (count, 1, 1))
    tilt = rng.normal(0.0, 0.12, (2, count, 1, 1))
    out += tilt[0] * (x - 0.5) + tilt[1] * (y - 0.5)
    for centre in (0.30, 0.70):
        cx = centre + rng.normal(0, 0.02, (count, 1, 1))
        cy = 0.5 + rng.normal(0, 0.03, (count, 1, 1))
        depth = rng.uniform(0.06, 0.26, (count, 1, 1))
        inside = ((x - cx) / 0.17) ** 2 + ((y - cy) / 0.36) ** 2
        out -= depth / (1.0 + np.exp(np.clip((inside - 1.0) * 8.0, -50, 50)))
    return out


def _places(count: int, config: HospitalConfig, rng: np.random.Generator) -> np.ndarray:
    """Corners of the two patches, int64 [n, 2, 2], uniform where the patches do not touch."""
    low, high = place_range(config)
    out = rng.integers(low, high + 1, (count, 2, 2))
    apart = 2 * config.patch_radius + 1
    while True:
        near = (np.abs(out[:, 0] - out[:, 1]) < apart).all(1)
        if not near.any():
            return out
        out[near] = rng.integers(low, high + 1, (int(near.sum()), 2, 2))


def place_range(config: HospitalConfig) -> tuple[int, int]:
    """First and last grid position of a patch's corner, the same for rows and columns."""
    margin = config.image_grid // 8
    return margin, config.image_grid - margin - (2 * config.patch_radius + 1)


def _place_weights(config: HospitalConfig) -> np.ndarray:
    """How many places of the other patch go with each place, at least 1: float64 [L, L]."""
    low, high = place_range(config)
    width, apart = high - low + 1, 2 * config.patch_radius + 1
    line = np.arange(width)
    near = (np.abs(line[:, None] - line[None, :]) < apart).sum(1)
    return np.maximum(width**2 - near[:, None] * near[None, :], 1).astype(np.float64)


def draw_images(
    latents: np.ndarray,
    config: HospitalConfig,
    rng: np.random.Generator,
    *,
    judged: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Images of given latents (uint8 [n, 2]) and P(i1 on | image), P(i2 on | image).

    Without `judged` the beliefs, which cost most of the time, are left at 0.5.

    Returns:
        float64 [n, G, G] grey in 0..1, and float64 [n, 2]. The belief is exact given the
        background and the other patch, its own place and phase summed out.
    """
    count, side = len(latents), config.image_grid
    patches = shapes(config)
    width = patches.shape[-1]
    clean = _background(count, side, rng)
    noise = rng.normal(0.0, config.pixel_noise, clean.shape)
    place = _places(count, config, rng)
    phase = rng.integers(0, SPOKE_PHASES, (count, 2))
    found = np.full((count, 2), 0.5)
    images = clean + noise
    for latent in range(2):
        alone = noise.copy()
        for n in range(count):
            top, left = place[n, latent]
            patch = patches[latent, latents[n, latent], phase[n, latent]]
            images[n, top : top + width, left : left + width] += patch
            alone[n, top : top + width, left : left + width] += patch
        if judged:
            found[:, latent] = _belief(alone, patches[latent], config)
    return images, found


def _belief(rest: np.ndarray, patches: np.ndarray, config: HospitalConfig) -> np.ndarray:
    """P(on | residual image), place and phase summed out: float64 [n]."""
    side = rest.shape[-1]
    low, high = place_range(config)
    prior = np.log(_place_weights(config)).ravel()
    spectrum = fft.rfft2(rest.astype(np.float32))
    scores = []
    for state in range(2):
        logs = []
        for patch in np.unique(patches[state], axis=0):  # equally often among the phases
            kernel = np.zeros((side, side), dtype=np.float32)
            kernel[: patch.shape[0], : patch.shape[1]] = patch
            match = fft.irfft2(spectrum * np.conj(fft.rfft2(kernel)), s=(side, side))
            match = match[:, low : high + 1, low : high + 1]
            energy = 0.5 * (patch**2).sum()
            ratio = (match.astype(np.float64) - energy) / config.pixel_noise**2
            logs.append(ratio.reshape(len(rest), -1) + prior)
        scores.append(logsumexp(np.concatenate(logs, axis=1), axis=1) - np.log(len(logs)))
    return 1.0 / (1.0 + np.exp(np.clip(scores[0] - scores[1], -700, 700)))


def to_jpeg(image: np.ndarray, size: int) -> bytes:
    """A grey JPEG with that side from a grid image in 0..1."""
    grey = np.clip(np.rint(image * 255.0), 0, 255).astype(np.uint8)
    picture = Image.fromarray(grey)
    if size != grey.shape[0]:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=92)
    return buffer.getvalue()
