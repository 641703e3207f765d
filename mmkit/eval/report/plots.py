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
class Line:
    """One series of a chart; `marks` draws hollow circles on dots, for values that are few."""

    style: int
    steps: list[float]
    values: list[float]
    marks: bool = False


def colour_of(style: int) -> str:
    """Stroke colour of a system."""
    return COLOURS[style % len(COLOURS)]


def dashes_of(style: int) -> str:
    """SVG ``stroke-dasharray`` of a system."""
    # Another dash with each turn through the colours, so that the eighth system does not look like the first.
    return DASHES[(style + style // len(COLOURS)) % len(DASHES)]


def chart_svg(lines: Sequence[Line], *, name: str, label: str, size: tuple[float, float] = (3.5, 2.3)) -> str:
    """Draw one chart over training steps.

    Args:
        lines: The series, drawn over each other.
        name: Distinguishes the ids inside this SVG from those of other charts on the page.
        label: Of the vertical axis, with its unit.
        size: Width and height in inches, before the page scales it.

    Returns:
        An ``<svg>`` element without title, legend, style or any text from the data: those belong to the page.
    """
    style = {
        "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
        "svg.hashsalt": name,  # reproducible ids, different in every chart
        "font.size": 10,
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
        for line in lines:
            _draw(axes, line)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        # Learning rates as 5e-4 over the axis, not as 0.0005 beside each tick.
        axes.ticklabel_format(axis="y", scilimits=(-2, 5), useMathText=False)
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


def _draw(axes: matplotlib.axes.Axes, line: Line) -> None:
    """A plain or dashed line; few values with markers, hollow so that both show where they meet a line."""
    steps, values = thin(line.steps, line.values)
    if not steps:
        return
    colour, dashes = colour_of(line.style), dashes_of(line.style)
    if line.marks:
        axes.plot(steps, values, color=colour, linewidth=0.7, linestyle=":", marker="o", markersize=3.5, mfc="none")
    else:
        pattern = (0, [float(d) for d in dashes.split()]) if dashes else "-"
        # A single point draws no line, so it gets a mark.
        axes.plot(steps, values, color=colour, linewidth=1.3, linestyle=pattern, marker="." if len(steps) == 1 else "")


def _inline(svg: str) -> str:
    """From a stand-alone SVG file to an element of an HTML page: no prolog, metadata, namespaces or fixed size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    # The size goes and the view box stays: the page decides how large a panel is.
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box is not None, "matplotlib wrote an SVG without viewBox"
    # A page that allows no style but its own (by hash) ignores style attributes; the same as attributes of SVG is no style.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' style="([^"]*)"', _attributes, svg)
    # matplotlib numbers its groups in every drawing anew; nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    # Hidden from screen readers, since title and legend are text of the page.
    svg = re.sub(r"<svg[^>]*>", f'<svg {box.group()} aria-hidden="true" focusable="false">', svg, count=1)
    # HTML knows no namespaces, and the ink takes the page's colour, light or dark.
    return svg.replace("xlink:href", "href").replace(_INK, "currentColor").strip()


def _attributes(style: re.Match[str]) -> str:
    """A style attribute's declarations as presentation attributes, fonts left to the page."""
    pairs = [declaration.partition(":") for declaration in style.group(1).split(";") if declaration.strip()]
    kept = [(name.strip(), value.strip()) for name, _, value in pairs if not name.strip().startswith("font-family")]
    # ``font: 10.5px sans-serif`` is shorthand, which SVG has no attribute for.
    sizes = [("font-size", size.group()) for name, value in kept if name == "font" and (size := re.search(r"[\d.]+px", value))]
    return "".join(f' {name}="{value}"' for name, value in [*(pair for pair in kept if pair[0] != "font"), *sizes])
