"""Training curves: per stage, the systems overlaid, a chart for each thing that a training's rows say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmkit.eval.report.collect import Collection
from mmkit.eval.report.plots import Line, chart_svg, colour_of, dashes_of
from mmkit.eval.report.runs import Run
from mmkit.eval.report.systems import Row

# Keys of a row of metrics.jsonl (mmkit.training.step_log) -> title, axis label, factor.
CHARTS = {
    "loss": ("Loss", "loss", 1.0),
    "lr": ("Learning rate", "learning rate", 1.0),
    "samples_per_second": ("Throughput", "samples per second", 1.0),
    "data_wait": ("Data wait", "% of the time", 100.0),
}
# Drawn with another one, in the same chart.
HELD_OUT = {"loss": "val_loss"}


@dataclass(frozen=True)
class Curve:
    """One training run: key of its rows -> steps and values of those that have it."""

    label: str
    run: str
    style: int
    series: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)

    @property
    def colour(self) -> str:
        """Stroke colour of this curve's system."""
        return colour_of(self.style)

    @property
    def dashes(self) -> str:
        """SVG ``stroke-dasharray`` of this curve's system."""
        return dashes_of(self.style)

    def values(self, key: str) -> list[float]:
        """The values of one key, none where the run has no such rows."""
        return self.series.get(key, ([], []))[1]

    def points(self, key: str) -> list[tuple[float, float]]:
        """(step, value) pairs of one key."""
        return list(zip(*self.series.get(key, ([], [])), strict=True))


@dataclass(frozen=True)
class Chart:
    """A drawing, its title, and what it shows in words."""

    title: str
    label: str
    svg: str


@dataclass(frozen=True)
class Panel:
    """Training curves of one stage, and the drawings of them."""

    title: str
    curves: list[Curve]
    charts: list[Chart]


def panels_of(collection: Collection, rows: Sequence[Row]) -> list[Panel]:
    """One panel per training stage, in the order the stages were run, systems overlaid.

    Two runs of one stage in a chain (align, then fine-tune) are two panels: ``llava``, ``llava, step 2``.
    """
    # Backwards, so that of two rows of one system the first gives the colour.
    styles = {row.runs[0].system or row.runs[0].name: i for i, row in reversed(list(enumerate(rows)))}
    by_path = {run.path: run for run in collection.everything()}
    stages: dict[tuple[int, str], list[Curve]] = {}
    for run in collection.everything():
        if run.kind == "train":
            lineage = [by_path[path] for path in collection.lineage(run)]
            step = 1 + sum(other.stage == run.stage for other in lineage)
            title = (run.stage or "training") + (f", step {step}" if step > 1 else "")
            # Counted along the lineage, not by start time: a later run of an early stage still belongs in front.
            depth = sum(other.kind == "train" for other in lineage)
            # An MLLM on a downloaded encoder has an ancestor fewer than one on an encoder that was pretrained here.
            stages.setdefault((depth, title), []).append(_curve(run, collection, styles))
    # The same stage at two depths is one panel, at the place of the first.
    merged: dict[str, list[Curve]] = {}
    for (_, title), curves in sorted(stages.items(), key=lambda item: item[0][0]):
        merged.setdefault(title, []).extend(curves)
    panels = [(title, _told_apart(curves, len(styles))) for title, curves in merged.items()]
    return [Panel(t, c, _charts(c, t, f"panel{i}")) for i, (t, c) in enumerate(panels)]


def _told_apart(curves: Sequence[Curve], free: int) -> list[Curve]:
    """Curves of one panel without two of one style: two runs of one system, and systems that no table has, are compared too."""
    used: set[int] = set()
    found = []
    for curve in curves:
        style = curve.style if curve.style not in used else next(n for n in itertools.count(free) if n not in used)
        used.add(style)
        found.append(replace(curve, style=style))
    return found


def _charts(curves: Sequence[Curve], stage: str, name: str) -> list[Chart]:
    """The charts of one stage, without those that no run has values for."""
    charts = []
    for key, (title, label, factor) in CHARTS.items():
        lines = [
            Line(curve.style, curve.series[part][0], [factor * v for v in curve.series[part][1]], marks=part != key)
            for part in filter(None, (key, HELD_OUT.get(key)))
            for curve in curves
            if curve.values(part)
        ]
        # The loss always: an empty chart says that a run wrote none.
        if lines or key == "loss":
            svg = chart_svg(lines, name=f"{name}-{key}", label=label)
            charts.append(Chart(title, f"{title} over steps, {stage}; first and last values in the table below", svg))
    return charts


def _curve(run: Run, collection: Collection, styles: dict[str, int]) -> Curve:
    """A run's rows, labelled and coloured by the system it made; several systems may share an encoder."""
    made = list(dict.fromkeys(c.system or c.name for c in collection.descendants(run) if c.kind != "train"))
    label = run.system or ", ".join(made) or run.name
    # A system that is not in the table gets a colour of its own, the same in all panels.
    style = next((styles[s] for s in [label, *made] if s in styles), None)
    style = styles.setdefault(label, len(styles)) if style is None else style
    series: dict[str, tuple[list[float], list[float]]] = {}
    for key in (*CHARTS, *HELD_OUT.values()):
        # Rows of metrics.jsonl hold training values, validation values, or both.
        rows = [(i, row) for i, row in enumerate(run.metrics) if _number(row.get(key))]
        if rows:
            series[key] = ([float(row.get("step", i)) for i, row in rows], [float(row[key]) for _, row in rows])
    return Curve(label, run.name, style, series)


def _number(value: Any) -> bool:
    # JSON from Python may hold NaN and inf, which no axis can show.
    return isinstance(value, (int, float)) and math.isfinite(value)
