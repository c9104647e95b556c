"""Every parameter of the synthetic hospital, in one frozen block."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data.config import Config

Release = Literal["mimic-iv-2.2", "mimic-iv-3.1", "mimic-iii-1.4"]


class HospitalConfig(Config):
    """The generative model's parameters; docs/synthetic-hospital.md explains each."""

    patients_per_block: int = 40
    """Patients that share a block of random streams; a block is always drawn whole."""
    image_rate: float = 0.60
    """Share of stays with an AP image in their first 48 hours, averaged over acuity."""
    acuity_on_image: float = 0.6
    """Change of the logit of having that image for one unit of acuity."""
    charting_rate: float = 0.88
    """Chance that an hourly vital sign is charted in an hour, at acuity 0."""
    acuity_on_charting: float = 0.05
    """Change of that chance for one unit of acuity."""
    motif_first_hour: int = 2
    """Earliest hour at which a temporal motif starts."""
    motif_last_hour: int = 42
    """A motif has ended by this hour of the stay, and by two hours before the stay's end."""
    motif_phase_hours: int = 4
    """Length of each of a motif's two phases."""
    leading: tuple[dict[str, float], dict[str, float]] = (
        {"Heart Rate": 32.0, "Temperature": 1.8},
        {
            "Systolic blood pressure": -30.0,
            "Diastolic blood pressure": -18.0,
            "Mean blood pressure": -22.0,
        },
    )
    """For e1 and e2: channels that move in the first phase when the latent is on, else in the
    second, and by how much, in the channel's unit."""
    following: tuple[dict[str, float], dict[str, float]] = (
        {"Respiratory rate": 11.0, "Glucose": 70.0},
        {"Oxygen saturation": -6.0},
    )
    """For e1 and e2: channels that move in the other phase."""
    lab_shift: float = 2.0
    """How far a lab test is moved to its side, in its spread."""
    renal_coupling: float = Field(default=0.0, ge=0, le=1)
    """Share of admissions whose urea nitrogen is moved to the side of creatinine. Both are noise to
    every label; otherwise no lab test says anything of another one."""
    image_grid: int = 64
    """Side of the grid on which images are drawn before they are enlarged."""
    patch_radius: int = 8
    """Radius of a local shape on that grid."""
    patch_amplitude: float = 0.30
    """Contrast of a local shape, of the full grey range."""
    pixel_noise: float = 0.06
    """Standard deviation of the grid's pixel noise, of the full grey range."""
    single_label: tuple[float, float] = (0.05, 0.75)
    """P(label | latent off), P(label | latent on) for labels planted in one modality."""
    both_label: tuple[float, float, float] = (0.02, 0.45, 0.97)
    """P(label | number of the two latents that are on: 0, 1, 2)."""
    xor_label: tuple[float, float] = (0.06, 0.90)
    """P(label | latents equal), P(label | latents differ)."""
    mortality: tuple[float, float, float] = (0.02, 0.20, 0.80)
    """P(death in hospital | number of the two latents that are on: 0, 1, 2)."""
    quirk_rate: float = 0.01
    """Share of chart rows touched by each kind of malformed value."""
    admission_quirk_rate: float = 0.05
    """Share of admissions with a second stay, and of stays with a unit transfer."""
    minor_rate: float = 0.02
    """Share of patients under 18."""
    old_rate: float = 0.03
    """Share of patients over 89."""
    short_stay_rate: float = 0.03
    """Share of stays of under 14 hours, too short for a motif."""
