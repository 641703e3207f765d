"""The gallery's data for the page's script: every sample of the drawn pictures, and their thumbnails in chunks.

The page stays one file that opens from disk, where a browser lets no script read a second one. So the samples are JSON inside
the page, and the thumbnails are lines of text in inert elements, which cost the browser nothing until the script asks for one.
"""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmkit.eval.metrics import describe, headline
from mmkit.eval.report.conditions import template_of
from mmkit.eval.report.gallery import Gallery, figure_of
from mmkit.eval.report.pictures import Picture, read_thumbnails
from mmkit.eval.report.runs import Prediction, Run

CHUNK = 100  # thumbnails in one inert element


@dataclass(frozen=True)
class Viewer:
    """What the script reads: JSON text of the samples, thumbnails as data URIs, a chunk of them an element."""

    content: str
    chunks: list[str]
    samples: int
    pictures: list[Picture]

    @property
    def size(self) -> int:
        """Bytes that the gallery adds to the page."""
        return len(self.content) + sum(map(len, self.chunks))


class _Numbers:
    """Texts by number, so that a task's or prompt's name stands in the page once."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def of(self, text: str) -> int:
        """The number of a text, a new one at first sight."""
        return self._known.setdefault(text, len(self._known))

    def texts(self) -> list[str]:
        """All texts in the order of their numbers."""
        return list(self._known)


def build_viewer(gallery: Gallery, *, thumbnail: int) -> Viewer:
    """Lay out all samples of the gallery's pictures.

    Args:
        gallery: The drawn pictures and what was asked about them.
        thumbnail: Longest side of a thumbnail, px.

    Returns:
        The viewer; empty texts where the gallery has no picture.
    """
    if not gallery.names:
        return Viewer("", [], 0, [])
    index = {name: i for i, name in enumerate(gallery.names)}
    runs = [next(run for a in gallery.asked if name in a for _, run in a[name].values()) for name in gallery.names]
    pictures = read_thumbnails(list(zip(gallery.names, runs, strict=True)), side=thumbnail)
    types, prompts = _Numbers(), _Numbers()
    tasks: dict[str, dict[str, Any]] = {}
    rows = []
    for name in gallery.names:
        here = [a.get(name, {}) for a in gallery.asked]
        for key in dict.fromkeys(key for answers in here for key in answers):
            found = [answers.get(key) for answers in here]
            rows.append((key, _sample(key, found, index[name], index, tasks, types, prompts)))
    # In the order of the data set, task by task, and not in that of the draw.
    order = list(tasks)
    rows.sort(key=lambda row: (order.index(row[0][0]), _natural(row[0][1])))
    content = {
        "systems": gallery.systems,
        "tasks": list(tasks.values()),
        "types": types.texts(),
        "prompts": prompts.texts(),
        "pictures": [[p.name, p.width, p.height, int(p.pixelated), p.missing] for p in pictures],
        "samples": [sample for _, sample in rows],
        "chunk": CHUNK,
        "side": thumbnail,
    }
    lines = [p.uri for p in pictures]
    chunks = ["\n".join(lines[i : i + CHUNK]) for i in range(0, len(lines), CHUNK)]
    return Viewer(to_script(content), chunks, len(rows), pictures)


def to_script(content: Any) -> str:
    """JSON that can stand inside a script element, whatever its texts hold."""
    # The one way out of a script element, or into its escaped state, begins with "<".
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _sample(
    key: tuple[str, str],
    found: Sequence[tuple[Prediction, Run] | None],
    picture: int,
    index: dict[str, int],
    tasks: dict[str, dict[str, Any]],
    types: _Numbers,
    prompts: _Numbers,
) -> list[Any]:
    """One sample as the script reads it: picture, task, type, id, question, references with counts, prompt, answers."""
    first, run = next(pair for pair in found if pair is not None)
    if key[0] not in tasks:
        tasks[key[0]] = _task(key[0], first, run)
    metric = tasks[key[0]]["metric"]
    references: dict[str, int] = {}
    for text in first.references:
        references[text] = references.get(text, 0) + 1
    asked = prompts.of(template_of(first))
    return [
        picture,
        list(tasks).index(key[0]),
        types.of(first.type),
        first.id,
        first.question or "",
        [[text, count] for text, count in references.items()],
        asked,
        [0 if pair is None else _answer(pair[0], metric, index, prompts, asked) for pair in found],
    ]


def _task(name: str, first: Prediction, run: Run) -> dict[str, Any]:
    """What the script has to know of a task: which figure of a sample counts, and whether it says right or wrong."""
    score = run.scores.get(name)
    order = headline(score.task if score else name, first.score)
    # A suite whose headline is no mean still marks its samples right or wrong.
    metric = "accuracy" if {"accuracy", "correct"} & first.score.keys() else next(iter(order), "")
    known = describe(metric)
    return {
        "name": name,
        "metric": metric,
        "heading": known.heading,
        "scale": known.scale,
        "digits": 0 if known.scale > 1 else known.digits,
        "marks": int(metric == "accuracy"),
    }


def _answer(prediction: Prediction, metric: str, index: dict[str, int], prompts: _Numbers, asked: int) -> list[Any]:
    """Text and figure; behind them, only where there are such: what was parsed, the picture really shown, another prompt."""
    value = figure_of(prediction, metric)
    shown = os.path.normpath(prediction.image_shown)
    blind = shown != os.path.normpath(prediction.image)
    # By number where it is among the thumbnails anyway, else by name: it is no reason for a larger page.
    other = index.get(shown, os.path.basename(shown)) if blind else None  # noqa: PTH119
    prompt = prompts.of(template_of(prediction))
    row = [
        prediction.text,
        None if value is None else round(value, 4),
        prediction.parsed,
        other,
        None if prompt == asked else prompt,
    ]
    while row[-1] is None and len(row) > 2:
        row.pop()
    return row


def _natural(key: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key in which 9 comes before 10."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", key) if part)
