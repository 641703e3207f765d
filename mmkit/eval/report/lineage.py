"""From data to score as a drawing: layers from left to right, each run one box that links to its details."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmkit.eval.metrics import describe, headline
from mmkit.eval.report.collect import find_parent
from mmkit.eval.report.conditions import short
from mmkit.eval.report.runs import Run

WIDTH, GAP_X, GAP_Y = 150, 38, 12  # px
LINE, PAD = 15, 8  # px: of text, and above and below it
LETTERS = 23  # that fit a box in the page's font
SCORES = 6  # lines in a score's box
SWEEPS = 6  # of the ordering; more change nothing on graphs of this size


@dataclass
class Node:
    """A box: a run with its scores, the data it read, or a model from elsewhere; `link` is an anchor of the page."""

    key: str
    kind: str
    lines: list[str]
    link: str
    full: str
    layer: int = 0
    x: float = 0.0
    y: float = 0.0

    @property
    def height(self) -> int:
        """Of the box, px."""
        return LINE * len(self.lines) + 2 * PAD


@dataclass(frozen=True)
class Lineage:
    """The drawing: boxes with places, curves as SVG paths, its size in px, and the same in words, a line an edge."""

    nodes: list[Node] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    width: float = 0.0
    height: float = 0.0
    words: list[str] = field(default_factory=list)


def build_lineage(runs: Sequence[Run]) -> Lineage:
    """Draw where every run came from.

    Args:
        runs: All runs of the report, parents first; their order gives the anchors ``run-0``, ``run-1``, …

    Returns:
        The drawing; empty without runs.
    """
    nodes = {str(run.path): _run_node(run, f"run-{number}") for number, run in enumerate(runs)}
    edges: dict[tuple[str, str], None] = {}
    for number, run in enumerate(runs):
        _add_parents(run, f"run-{number}", nodes, edges)
    _set_layers(list(nodes.values()), [(nodes[a], nodes[b]) for a, b in edges])
    for number, run in enumerate(runs):
        _add_data(run, f"run-{number}", nodes, edges)
    pairs = [(nodes[a], nodes[b]) for a, b in edges]
    columns = _order(list(nodes.values()), pairs)
    height = _place(columns)
    paths = [_path(a, b) for a, b in pairs]
    words = [f"{a.full} → {b.full}" for a, b in pairs]
    return Lineage(list(nodes.values()), paths, len(columns) * (WIDTH + GAP_X) - GAP_X, height, words)


def _run_node(run: Run, link: str) -> Node:
    """Name, what it was, the fingerprint of what it made, and the headline figure of each task it scored."""
    product = str(run.manifest.get("product") or "")
    what = ", ".join(dict.fromkeys(filter(None, (run.imported or run.kind, run.stage))))
    lines = [_clip(run.name, end=True), _clip(what)] + ([short(product)] if product else [])
    figures = []
    for task, score in run.scores.items():
        name = next(iter(headline(score.task, score.metrics)), "")
        if name:
            figures.append(f"{_clip(task, LETTERS - 7)} {describe(name).show(score.metrics[name])}")
    more = [f"and {len(figures) - SCORES} more"] if len(figures) > SCORES else []
    full = f"{run.name} ({'; '.join([what, *figures])})"
    return Node(str(run.path), run.kind, [*lines, *figures[:SCORES], *more], link, full, layer=1)


def _add_parents(run: Run, link: str, nodes: dict[str, Node], edges: dict[tuple[str, str], None]) -> None:
    """Edges from a run's parents, and boxes for those that are no runs."""
    for entry in run.manifest.get("parents") or []:
        found = find_parent(entry.get("path"), run.path)
        key = str(found) if found and str(found) in nodes else f"model:{entry.get('path')}"
        if key not in nodes:
            name, mark = str(entry.get("path") or "unnamed"), str(entry.get("fingerprint") or "")
            lines = [_clip(Path(name).name, end=True), "from elsewhere"] + ([short(mark)] if mark else [])
            nodes[key] = Node(key, "elsewhere", lines, link, name, layer=1)
        edges[key, str(run.path)] = None


def _add_data(run: Run, link: str, nodes: dict[str, Node], edges: dict[tuple[str, str], None]) -> None:
    """An edge from a run's data, whose box stands just left of it: again in each layer, so that no line passes a box."""
    data = run.manifest.get("data") or {}
    mark = str(data.get("fingerprint") or "") if isinstance(data, dict) else ""
    if mark:
        layer = nodes[str(run.path)].layer - 1
        key = f"data:{layer}:{mark}"
        nodes.setdefault(key, Node(key, "data", ["data", short(mark)], link, f"data {short(mark)}", layer=layer))
        edges[key, str(run.path)] = None


def _clip(text: str, most: int = LETTERS, *, end: bool = False) -> str:
    """At most `most` letters; of a name with folders the end tells more."""
    if len(text) <= most:
        return text
    return "…" + text[1 - most :] if end else text[: most - 1] + "…"


def _set_layers(nodes: Sequence[Node], pairs: Sequence[tuple[Node, Node]]) -> None:
    """Every box right of all it came from; what came from nothing stands just left of its first use."""
    # As many rounds as the longest path has steps; a circle of edited manifests ends with the count of boxes.
    for _ in nodes:
        moved = False
        for a, b in pairs:
            if b.layer <= a.layer <= len(nodes):
                b.layer, moved = a.layer + 1, True
        if not moved:
            break
    sources = {id(a) for a, _ in pairs} - {id(b) for _, b in pairs}
    for node in nodes:
        if id(node) in sources and node.kind == "elsewhere":
            node.layer = min(b.layer for a, b in pairs if a is node) - 1


def _order(nodes: Sequence[Node], pairs: Sequence[tuple[Node, Node]]) -> list[list[Node]]:
    """Layers as columns, each sorted towards the middle of its neighbours, so that few lines cross (barycentre method)."""
    used = sorted({node.layer for node in nodes})
    columns = [[node for node in nodes if node.layer == layer] for layer in used]
    place = {id(node): float(i) for column in columns for i, node in enumerate(column)}
    for sweep in range(SWEEPS):
        # To the right by where a box comes from, back to the left by where it leads.
        forward = sweep % 2 == 0
        for column in columns if forward else reversed(columns):
            middles = {}
            for node in column:
                near = [a for a, b in pairs if b is node] if forward else [b for a, b in pairs if a is node]
                middles[id(node)] = sum(place[id(n)] for n in near) / len(near) if near else place[id(node)]
            column.sort(key=lambda node: middles[id(node)])
            # As shares of the column's length: a short column's middle is that of a long one.
            place |= {id(node): (i + 0.5) / len(column) * 100 for i, node in enumerate(column)}
    return columns


def _place(columns: Sequence[Sequence[Node]]) -> float:
    """Give every box its place, columns centred; returns the height of the drawing."""
    tall = [sum(node.height for node in column) + GAP_Y * (len(column) - 1) for column in columns]
    height = max(tall, default=0)
    for i, column in enumerate(columns):
        y = (height - tall[i]) / 2
        for node in column:
            node.x, node.y = i * (WIDTH + GAP_X), y
            y += node.height + GAP_Y
    return height


def _path(a: Node, b: Node) -> str:
    """A curve from the right edge of one box to the left edge of another."""
    x0, y0, x1, y1 = a.x + WIDTH, a.y + a.height / 2, b.x, b.y + b.height / 2
    bend = max(GAP_X / 2, (x1 - x0) / 2)
    return f"M{x0:g} {y0:.1f}C{x0 + bend:g} {y0:.1f} {x1 - bend:g} {y1:.1f} {x1:g} {y1:.1f}"
