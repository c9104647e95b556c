"""A plan as text and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data.describe import table
from fusion.planning.options import gib, smallest

if TYPE_CHECKING:
    from fusion.planning.options import Option
    from ray_jobs.plan import Plan

HEAD = ("strategy", "offload", "tuning", "rows", "times", "device", "node", "step s", "hours", "")


def text(plan: Plan, *, arithmetic: bool = False) -> str:
    """The plan for people to read."""
    rows = [HEAD]
    for option in plan.options:
        hours = f"{option.seconds * plan.steps / 3600:.1f}" if plan.steps else "-"
        mark = "<- take this" if option in plan.best else option.lacking or "fits"
        rows.append(
            (
                option.layout.strategy,
                option.layout.offload,
                option.note or "full",
                str(option.cut.rows),
                str(option.layout.accumulation),
                gib(option.device),
                gib(option.host),
                f"{option.seconds:.3g}",
                hours,
                mark,
            )
        )
    lines = [*plan.head, "", table(rows), "", plan.disk, _advice(plan)]
    if arithmetic:
        lines += ["", *_arithmetic(plan.best[0] if plan.best else smallest(plan.options))]
    return "\n".join(lines)


def _advice(plan: Plan) -> str:
    if not plan.best:
        least = smallest(plan.options)
        if plan.change is None:
            return (
                f"nothing fits: the least is {least.layout.strategy} with offload="
                f"{least.layout.offload}, {least.lacking}; no single key is enough, so more or "
                "larger machines are needed"
            )
        return f"nothing fits ({least.lacking} at the least); change one thing: {plan.change}"
    return "\n".join(_take(option) for option in plan.best)


def _take(option: Option) -> str:
    layout = option.layout
    keys = [f"scaling.strategy={layout.strategy}", f"scaling.num_workers={layout.world}"]
    if layout.offload != "none":
        keys.append(f"scaling.offload={layout.offload}")
    keys.append(option.cut.key)
    return f"take{' for ' + option.note if option.note else ''}: {' '.join(keys)}"


def _arithmetic(option: Option) -> list[str]:
    """The sum behind one option's memory."""
    parts = [f"  {gib(size):>10}  {name}" for name, size in option.memory.worst.items() if size]
    parts += [
        f"  {gib(size):>10}  {name} (host)" for name, size in option.memory.host.items() if size
    ]
    extra = option.device - option.memory.device_peak
    return [
        f"one worker of {option.layout.strategy}, offload={option.layout.offload}, "
        f"{option.cut.rows} row(s) a micro-batch, at its worst moment:",
        *parts,
        f"  {gib(extra):>10}  process, context and host",
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan for programs to read."""
    return {
        "best": [plan.options.index(option) for option in plan.best],
        "change": plan.change,
        "steps": plan.steps,
        "options": [
            {
                "strategy": option.layout.strategy,
                "offload": option.layout.offload,
                "workers": option.layout.world,
                "accumulation": option.layout.accumulation,
                "micro_rows": option.cut.rows,
                "cut_by": option.cut.key,
                "tuning": option.note or "full",
                "device_bytes": option.device,
                "node_bytes": option.host,
                "step_seconds": option.seconds,
                "fits": option.lacking is None,
                "lacking": option.lacking,
                "parts": option.memory.worst,
                "host_parts": option.memory.host,
            }
            for option in plan.options
        ],
    }
