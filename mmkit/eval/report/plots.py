"""Training curves as compact inline SVG that follows the page's light or dark colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette (without its yellow and black), readable on white and on near-black, told apart in print by dashes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b1609a", "#b07d00", "#3f9bd1", "#808080")
DASHES = ("", "5 2", "1.5 1.5", "7 2 1.5 2", "3 3", "9 3", "2 4")
MAX_POINTS = 300
# Stands for "the page's text colour" while matplotlib draws; no data colour comes near it.
_INK = "#010203"
_STEPS = [1, 2, 2.5, 5, 10]


@dataclass(frozen=True)
class Curve:
    """One run's losses: training rows as a line, validation rows as a dotted line with markers."""

    label: str
    run: str
    style: int
    steps: list[float]
    loss: list[float]
    val_steps: list[float]
    val_loss: list[float]

    @property
    def colour(self) -> str:
        """Stroke colour of this curve's system."""
        return COLOURS[self.style % len(COLOURS)]

    @property
    def dashes(self) -> str:
        """SVG ``stroke-dasharray`` of this curve's system."""
        return DASHES[self.style % len(DASHES)]


def curves_svg(curves: Sequence[Curve], *, name: str, size: tuple[float, float] = (4.4, 2.5)) -> str:
    """Draw one panel of loss curves.

    Args:
        curves: The curves, drawn over each other.
        name: Distinguishes the ids inside this SVG from those of other panels on the page.
        size: Width and height in inches, before the page scales it.

    Returns:
        An ``<svg>`` element without title, legend or any text from the data: those belong to the page.
    """
    style = {
        "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
        "svg.hashsalt": name,  # reproducible ids, different in every panel
        "font.size": 10.5,
        "font.family": ["sans-serif"],
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.linewidth": 0.6,
    }
    with matplotlib.rc_context(style):
        # No pyplot: it keeps global state and may ask for a display.
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            _draw(axes, curve)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.grid(axis="y", linewidth=0.4, alpha=0.25, color=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        # Without date and version the same runs give the same bytes.
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(drawn.getvalue())


def thin(steps: Sequence[float], values: Sequence[float], most: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most `most` points: means over equal runs of neighbours, so that a long training stays a small file.

    Args:
        steps: x values, n of them.
        values: y values, n of them; those that are not finite are left out.
        most: Upper limit of points.

    Returns:
        The thinned x and y.
    """
    points = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(s) and math.isfinite(v)]
    width = max(1, math.ceil(len(points) / most))
    # Means instead of every n-th value: single steps are noise, which picking would keep.
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [g[-1][0] for g in groups], [math.fsum(v for _, v in g) / len(g) for g in groups]


def _draw(axes: matplotlib.axes.Axes, curve: Curve) -> None:
    """Training loss as a line; validation loss with markers, hollow so that both show where they meet."""
    dashes = (0, [float(d) for d in curve.dashes.split()]) if curve.dashes else "-"
    steps, loss = thin(curve.steps, curve.loss)
    # A single point draws no line, so it gets a mark.
    if steps:
        axes.plot(steps, loss, color=curve.colour, linewidth=1.3, linestyle=dashes, marker="." if len(steps) == 1 else "")
    steps, loss = thin(curve.val_steps, curve.val_loss)
    if steps:
        axes.plot(steps, loss, color=curve.colour, linewidth=0.7, linestyle=":", marker="o", markersize=3.5, mfc="none")


def _inline(svg: str) -> str:
    """From a stand-alone SVG file to an element of an HTML page: no prolog, metadata, namespaces or fixed size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    # The size goes and the view box stays: the page decides how large a panel is.
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box is not None, "matplotlib wrote an SVG without viewBox"
    # Hidden from screen readers, since title and legend are text of the page.
    svg = re.sub(r"<svg[^>]*>", f'<svg {box.group()} aria-hidden="true" focusable="false">', svg, count=1)
    # HTML knows no namespaces, and the ink takes the page's colour, light or dark.
    return svg.replace("xlink:href", "href").replace(_INK, "currentColor").strip()
