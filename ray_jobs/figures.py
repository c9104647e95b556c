"""Figures as inline SVG: no network, text stays text, colours follow the page's light or dark."""

from __future__ import annotations

import io
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

INK = "#0a0b0c"
"""Stands for the page's text colour; becomes `currentColor`."""
COLOURS = ("#3b82c4", "#d9772b", "#2f9e6e", "#b0569c", "#8a7a2e", "#6b6fd1")
_WIDTH, _HEIGHT = 4.6, 2.9
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    **dict.fromkeys(
        (
            "text.color",
            "axes.labelcolor",
            "axes.edgecolor",
            "axes.titlecolor",
            "xtick.color",
            "ytick.color",
            "grid.color",
        ),
        INK,
    ),
}
Points = list[tuple[float, float]]


def curves(series: Mapping[str, Points], *, title: str, salt: str) -> str:
    """Lines over epochs, one for each name; a name without points is left out."""
    with canvas(title, salt) as (axes, done):
        for colour, (name, points) in zip(_cycle(), series.items(), strict=False):
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, marker="o", markersize=3, color=colour, label=name)
        axes.set(xlabel="epoch", title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(series) > 1:
            axes.legend()
    return done[0]


def reliability(curves_of: Mapping[str, Points], *, title: str, salt: str) -> str:
    """Observed share of positives over mean prediction, for each named set."""
    with canvas(title, salt) as (axes, done):
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
        for colour, (name, points) in zip(_cycle(), curves_of.items(), strict=False):
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, marker="o", markersize=4, color=colour, label=name)
        axes.set(xlabel="predicted", ylabel="observed", xlim=(0, 1), ylim=(0, 1), title=title)
        axes.legend(loc="upper left")
    return done[0]


def sweep(points: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str, salt: str) -> str:
    """A score with its interval over the share of X-rays withheld.

    Args:
        points: Name -> {share, value, lower, upper}; bounds may be None.
        title: Above the figure, and its alternative text.
        salt: Keeps the figure's ids its own.
    """
    with canvas(title, salt) as (axes, done):
        for colour, (name, rows) in zip(_cycle(), points.items(), strict=False):
            shares = [100 * row["share"] for row in rows]
            axes.plot(
                shares, [row["value"] for row in rows], marker="o", markersize=3, color=colour
            )
            bounded = [row for row in rows if row["lower"] is not None]
            if bounded:
                axes.fill_between(
                    [100 * row["share"] for row in bounded],
                    [row["lower"] for row in bounded],
                    [row["upper"] for row in bounded],
                    color=colour,
                    alpha=0.2,
                    linewidth=0,
                    label=name,
                )
        axes.set(xlabel="X-rays withheld, %", title=title)
        if len(points) > 1:
            axes.legend()
    return done[0]


def scatter(groups: Mapping[str, NDArray[np.floating]], *, title: str, salt: str) -> str:
    """Points ([N, 2] each) of named groups."""
    with canvas(title, salt) as (axes, done):
        for colour, (name, points) in zip(_cycle(), groups.items(), strict=False):
            axes.scatter(points[:, 0], points[:, 1], s=7, color=colour, alpha=0.7, linewidths=0)
            axes.scatter([], [], s=20, color=colour, label=name)
        axes.set(xticks=[], yticks=[], title=title)
        axes.grid(visible=False)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return done[0]


def embed(
    representations: Mapping[str, NDArray[np.floating]],
) -> dict[str, NDArray[np.floating]]:
    """One t-SNE map of several representations of the same rows: {name: [N, D]} -> {name: [N, 2]}.

    van der Maaten and Hinton (2008); from principal components, seeded.
    """
    from sklearn.manifold import TSNE

    stacked = np.concatenate(list(representations.values())).astype(np.float64)
    rows = len(next(iter(representations.values())))
    if not np.ptp(stacked, axis=0).any():
        return {name: np.zeros((rows, 2)) for name in representations}
    perplexity = min(30.0, (len(stacked) - 1) / 3)
    placed = TSNE(perplexity=perplexity, init="pca", random_state=0, n_jobs=1).fit_transform(
        stacked
    )
    return dict(
        zip(representations, np.split(placed, len(representations)), strict=True),
    )


def _cycle() -> Iterator[str]:
    while True:
        yield from COLOURS


@contextmanager
def canvas(title: str, salt: str) -> Iterator[tuple[Any, list[str]]]:
    """Axes to draw on; afterwards the list holds the SVG."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    done: list[str] = []
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(_WIDTH, _HEIGHT))
        FigureCanvasSVG(figure)
        yield figure.add_subplot(), done
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    done.append(_inline(stream.getvalue(), title))


def _inline(svg: str, title: str) -> str:
    """Only the svg element, without namespaces, metadata, fixed size and the ids nobody uses."""
    from markupsafe import escape

    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', body)
    content = body[body.index(">") + 1 :].replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', content))
    content = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", content)
    content = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", content)
    content = content.replace(INK, "currentColor")
    label = escape(title)
    return f'<svg {view[0] if view else ""} role="img" aria-label="{label}">{content}'
