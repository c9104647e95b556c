"""The run that `rayfuse chaos` disturbs: the user's, or one on a synthetic hospital made for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.errors import InputError
from ray_jobs import config as run_config

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ray_jobs.config import RunConfig

EVERY_STEPS = 10
PATIENTS = 150
SEED = 2026


def prepare(path: Path | None, overrides: Sequence[str], folder: Path) -> RunConfig:
    """The run to disturb: of a YAML, or small networks on a synthetic hospital made here.

    Args:
        path: The run's YAML; None for the synthetic one.
        overrides: Dotted ones.
        folder: Where its runs go, and the synthetic hospital.

    Raises:
        InputError: The YAML is wrong, or has stages.
    """
    from data.switches import Sources
    from ray_jobs import extract

    own = [f"runs_dir={folder / 'runs'}"]
    if path is None:
        own.append(f"data.shards={folder / 'shards'}")
        own.append(f"data.batches.cache_dir={folder / 'cache'}")
    runs = run_config.load(path or run_config.CONFIGS / "chaos.yaml", [*own, *overrides])
    if len(runs) > 1:
        raise InputError(f"{path}: has stages; give chaos one run")
    config = runs[0]
    if path is None:
        from data.sources import synthetic

        hospital = folder / "hospital"
        synthetic.generate(
            hospital, patients=PATIENTS, seed=SEED, release="mimic-iv-2.2", image_size=64
        )
        sources = Sources(
            mimic_iv=hospital / "mimiciv" / "2.2", mimic_cxr=hospital / "mimic-cxr-jpg" / "2.0.0"
        )
        rules = config.data.extract
        extract.run(sources, config.task, config.data.shards, preset="corrected", config=rules)
    if config.checkpoint.every_steps is None:
        update = {"checkpoint": config.checkpoint.model_copy(update={"every_steps": EVERY_STEPS})}
        config = config.model_copy(update=update)
    return config
