"""Where a run begins: its newest whole checkpoint, or else `init_from`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusion.training import checkpoint
from fusion.training.agreed import AgreedError, agreed
from fusion.training.embeddings import embed
from fusion.training.initialise import frozen_base, initial_weights, read_base
from fusion.training.objective import Objective
from fusion.training.references import read_references, refuse_other_base

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from fusion.training.loop import Session


def start(session: Session) -> None:
    """Fill the model from the newest complete checkpoint, or else from `init_from`; then prepare.

    Raises:
        AgreedError: The checkpoint or the initial weights are of another model or base, the disk
            is too small for the run's checkpoints, or embeddings cannot be computed.
    """
    strategy, settings, saver = session.strategy, session.settings, session.saver
    mine = agreed(
        strategy,
        lambda: checkpoint.newest_complete(saver.checkpoints) if strategy.rank == 0 else None,
    )
    found = strategy.share(mine)
    assert found is not None
    held = checkpoint.read(found)
    saver.referenced = read_references(strategy)
    elsewhere = {name for base in saver.referenced.values() for name in base.names}
    shapes = {name: shape for name, shape in strategy.shapes().items() if name not in elsewhere}
    weights = agreed(strategy, lambda: _first_weights(session, held, shapes))
    if fault := strategy.share(saver.lacking_space(shapes)):
        raise AgreedError(fault)
    strategy.load_weights(weights)
    if held:
        session.progress = held.meta.progress
    embedded = None if session.embeddings is None else embed(session, session.embeddings)
    objective = Objective(strategy.model, session.task, settings.train)
    strategy.prepare(objective, settings.optim)
    if held:
        strategy.load_moments(held.moments)
        held.restore_worker(strategy, settings.seed)
        session.schedule.load(held.meta.schedule)
    event = {
        "event": "start",
        "updates": session.progress.updates,
        "world": strategy.world,
        "skipped": found.skipped,
    }
    session.log.write("event", session.progress, event)
    if embedded is not None:
        session.log.write("event", session.progress, {"event": "embeddings", **embedded})
    saver.start_clock()


def _first_weights(
    session: Session, held: checkpoint.Held | None, shapes: Mapping[str, torch.Size]
) -> Mapping[str, Tensor]:
    """Weights to begin with; tells the saver which of them stay as their source has them."""
    model, sources = session.strategy.model, session.init_from
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    if held is None:
        text: Any = getattr(model, "text", None)
        reader = (text, session.task.spec.labels) if hasattr(text, "adapter_config") else None
        given = initial_weights(shapes, sources, session.saver.referenced, reader)
        session.saver.base = frozen_base(given, sources, frozen)
        return given
    held.refuse_other_data(session.document)
    for prefix, stored in held.meta.referenced.items():
        here = session.saver.referenced.get(prefix)
        refuse_other_base(prefix, stored, here.sha256 if here else None)
    base = read_base(held.meta.base, sources)
    session.saver.base = frozen_base(base, sources, frozen)
    return held.weights(shapes, base)
