"""The extraction job: raw or staged tables and images into shards."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, get_args

if TYPE_CHECKING:
    from pathlib import Path

    from data.manifest import Manifest
    from data.switches import ExtractConfig, Sources

logger = logging.getLogger(__name__)

_NO_RULES: Final = ("partitions", "split", "image_short_side")
"""Switches that no preset is about."""
_OF_THE_SOURCE: Final = ("label_file", "meds", "abnormal")
"""Of `admissions`: what a hospital codes, measures and flags, not a rule on it."""


def run(sources: Sources, task: str, out: Path, *, preset: str, config: ExtractConfig) -> Manifest:
    """Extract the samples of a task; the caller has connected Ray.

    Args:
        sources: Folders of raw or staged tables, and of images.
        task: A name of data.tasks.
        out: Folder for shards and manifest.
        preset: The preset that `config` began with.
        config: The data switches; where they equal no preset, the manifest says `custom`.

    Raises:
        InputError: A fault of the sources or of `out`, or an empty cohort.
    """
    from data.pipeline import extract

    named = name_of(config, preset)
    if named != preset:
        logger.info("the switches differ from preset %s: recorded as %s", preset, named)
    return extract(sources, task, config, out, preset=named)


def name_of(config: ExtractConfig, preset: str) -> str:
    """The preset whose rules these switches are, `preset` first; `custom` where none has them."""
    from ray_jobs.config import Preset

    presets = get_args(Preset)
    if preset not in presets:
        return "custom"
    ordered = [preset, *(name for name in presets if name != preset)]
    return next((name for name in ordered if _follows(config, name)), "custom")


def _follows(config: ExtractConfig, preset: str) -> bool:
    """Whether every switch has a value of the preset, where it depends on the model any of them."""
    from ray_jobs.config import Preset, extract_config, preset_values

    name: Preset = preset  # type: ignore[assignment]
    expected, chosen = _rules(extract_config(name)), _rules(config)
    by_model: dict[str, list[object]] = {}
    for dotted, value in preset_values(name).items():
        block, _, switch = dotted.partition(".extract.")
        if switch and "[" in block:
            by_model.setdefault(switch, []).append(value)
    return all(
        value in [expected[switch], *by_model.get(switch, [])] for switch, value in chosen.items()
    )


def _rules(config: ExtractConfig) -> dict[str, object]:
    rules = config.model_dump(exclude=set(_NO_RULES))
    return rules | {"admissions": config.admissions.model_dump(exclude=set(_OF_THE_SOURCE))}
