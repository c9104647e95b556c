"""Frozen weights that a model's constructor reads itself: named in checkpoints, never copied there.

A checkpoint and best/ hold their source and hash; weights trained on one base are refused on
another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data.errors import InputError
from fusion.training.agreed import agreed
from fusion.training.checkpoint import Base

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from fusion.model import FusionModel
    from fusion.training.strategy import Strategy


def read_references(strategy: Strategy) -> dict[str, Base]:
    """What the constructor has read and nothing trains, by prefix; worker 0 hashes it for all."""

    def read() -> dict[str, Base]:
        references = strategy.model.references() if strategy.rank == 0 else {}
        return {
            prefix: Base(
                source=each.source,
                sha256=each.digest(),
                names=tuple(sorted(each.names)),
                setting=each.setting,
            )
            for prefix, each in references.items()
        }

    return strategy.share(agreed(strategy, read))


def stored_references(meta: Mapping[str, Any]) -> dict[str, Base]:
    """Those that the meta.json of best/ names."""
    return {
        prefix: Base.model_validate({**base, "names": tuple(base["names"])})
        for prefix, base in meta.get("referenced", {}).items()
    }


def fill(model: FusionModel, weights: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Give a model its best weights; what best/ leaves to a reference, its constructor has read.

    Args:
        model: Of the run's config.
        weights: As `read_weights` gives them.
        meta: Likewise.

    Raises:
        InputError: They are of another model, or its constructor has read another reference.
    """
    stored = stored_references(meta)
    references = model.references()
    for prefix, base in stored.items():
        digest = references[prefix].digest() if prefix in references else None
        refuse_other_base(prefix, base, digest)
    left_out = {name for base in stored.values() for name in base.names}
    unexpected = weights.keys() - model.state_dict().keys()
    missing = model.state_dict().keys() - weights.keys() - left_out
    if missing or unexpected:
        what = (
            f"lack {min(missing)!r}" if missing else f"hold {min(unexpected)!r}, which it has not"
        )
        raise InputError(f"the weights are not of this config's model: they {what}; train again")
    try:
        model.load_state_dict(dict(weights), strict=False)
    except RuntimeError as error:
        raise InputError(
            f"the weights are not of this config's model ({error}); train again"
        ) from None


def refuse_other_base(prefix: str, stored: Base, digest: str | None) -> None:
    """Refuse weights that were trained on another base.

    Args:
        prefix: Of the submodule that holds the base.
        stored: What they were trained on.
        digest: Of the base that is there now; None where there is none.

    Raises:
        InputError: It is another one.
    """
    if digest != stored.sha256:
        now = f"is sha256 {digest}" if digest else "has random weights"
        raise InputError(
            f"{stored.setting}: these weights were trained on {stored.source} (sha256 "
            f"{stored.sha256}), but what is under {prefix!r} now {now}; put those back"
        )
