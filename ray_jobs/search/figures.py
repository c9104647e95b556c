"""Figures of a search, as inline SVG in the style of the run report's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ray_jobs.figures import COLOURS, INK, canvas

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ray_jobs.figures import Points

LEVELS = 10


def history(points: Points, best: Points, *, title: str, label: str, salt: str) -> str:
    """Each trial's value by its number, and the best so far."""
    with canvas(title, salt) as (axes, done):
        axes.scatter(*_columns(points), s=14, color=COLOURS[0], alpha=0.8, label="trial")
        axes.step(*_columns(best), where="post", color=COLOURS[1], label="best so far")
        axes.set(xlabel="trial", ylabel=label, title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    return done[0]


def epochs(
    series: Mapping[str, Points], pruned: set[str], *, title: str, label: str, salt: str
) -> str:
    """Each trial's value after each epoch; where a pruned one ended, a cross."""
    with canvas(title, salt) as (axes, done):
        for name, points in series.items():
            colour = COLOURS[1] if name in pruned else COLOURS[0]
            axes.plot(*_columns(points), linewidth=0.9, alpha=0.7, color=colour)
            if name in pruned:
                axes.plot(*points[-1], marker="x", markersize=5, color=colour)
        axes.set(xlabel="epoch", ylabel=label, title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return done[0]


def importance(shares: Mapping[str, float], *, title: str, salt: str) -> str:
    """A bar for each path, the largest on top."""
    ordered = sorted(shares.items(), key=lambda item: item[1])
    with canvas(title, salt) as (axes, done):
        axes.barh([path for path, _ in ordered], [share for _, share in ordered], color=COLOURS[0])
        axes.set(xlabel="share of the variance explained", title=title)
        axes.grid(visible=False, axis="y")
    return done[0]


def value_slice(
    values: Sequence[object],
    scores: Sequence[float],
    *,
    path: str,
    label: str,
    log: bool,
    salt: str,
) -> str:
    """A trial's score by its value of one path; listed values are spread evenly."""
    with canvas(path, salt) as (axes, done):
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            axes.scatter(values, scores, s=14, color=COLOURS[0], alpha=0.8)
            if log:
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter("{x:g}")  # mathtext is not parsed here
                axes.xaxis.set_minor_formatter("")
        else:
            axes.scatter([str(value) for value in values], scores, s=14, color=COLOURS[0])
        axes.set(xlabel=path, ylabel=label, title=path)
    return done[0]


def contour(
    x: Sequence[float], y: Sequence[float], scores: Sequence[float], *, names: tuple[str, str],
    logs: tuple[bool, bool], salt: str,
) -> str:  # fmt: skip
    """Scores over two paths, interpolated between trials, which are dots."""
    from matplotlib.tri import Triangulation

    title = f"{names[0]} and {names[1]}"
    across = np.log10(x) if logs[0] else np.asarray(x, float)
    up = np.log10(y) if logs[1] else np.asarray(y, float)
    with canvas(title, salt) as (axes, done):
        if _spans(across, up):
            shape = Triangulation(across, up)
            drawn = axes.tricontourf(shape, scores, levels=LEVELS, cmap="viridis")
            axes.figure.colorbar(drawn, ax=axes)
        axes.scatter(across, up, s=9, color=INK)
        axes.set(
            xlabel=f"log10 {names[0]}" if logs[0] else names[0],
            ylabel=f"log10 {names[1]}" if logs[1] else names[1],
            title=title,
        )
    return done[0]


def front(points: Points, best: Points, *, names: tuple[str, str], salt: str) -> str:
    """Two metrics of each trial; those of the Pareto front apart."""
    with canvas("Pareto front", salt) as (axes, done):
        axes.scatter(*_columns(points), s=14, color=COLOURS[0], alpha=0.6, label="trial")
        axes.plot(
            *_columns(sorted(best)), marker="o", markersize=4, color=COLOURS[1], label="front"
        )
        axes.set(xlabel=names[0], ylabel=names[1], title="Pareto front")
        axes.legend()
    return done[0]


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _spans(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether points are not all on one line, so that they span triangles."""
    centred = np.stack([x - x.mean(), y - y.mean()])
    scale = np.abs(centred).max(axis=1, keepdims=True)
    if len(x) < 4 or not scale.all():
        return False
    return bool(np.linalg.svd(centred / scale, compute_uv=False)[1] > 1e-6)
