"""Held-out pictures, drawn by seed, with the truth and what each system said."""

from __future__ import annotations

import os.path
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmkit.eval.report.pictures import Picture, read_picture
from mmkit.eval.report.runs import Prediction, Run
from mmkit.eval.report.systems import Row

SAMPLE = 12  # pictures that are on the page itself, also without JavaScript
SHOWN = 224  # px: longest side on the page
THUMB = 56  # px: pictures that a blind system was really shown
QUESTIONS = 4  # per picture

# Picture -> (task, id) -> prediction and its run, of one system.
Asked = dict[str, dict[tuple[str, str], tuple[Prediction, Run]]]


@dataclass(frozen=True)
class Answer:
    """What one system said; `mark` is right, partly, wrong or empty, `score` the figure beside it.

    `shown` is the picture a blind system saw instead, `shown_before` that the row above in its column shows it already.
    """

    text: str
    mark: str
    score: str
    shown: Picture | None
    shown_before: bool = False


@dataclass(frozen=True)
class Item:
    """A caption (`question` empty) or a question, its truth, and an answer per system (None: not asked)."""

    task: str
    id: str
    question: str
    truth: str
    more_truths: list[str]
    answers: list[Answer | None]


@dataclass(frozen=True)
class Entry:
    """One picture of the gallery; `left_out` counts its further questions."""

    picture: Picture
    items: list[Item]
    left_out: int


@dataclass(frozen=True)
class Gallery:
    """The sample on the page, the names of all drawn pictures, how many there were to draw from, systems in column order."""

    systems: list[str]
    entries: list[Entry]
    pool: int
    names: list[str]
    asked: list[Asked]

    def missing(self) -> list[Picture]:
        """Pictures that could not be shown, each once."""
        pictures = [e.picture for e in self.entries]
        pictures += [a.shown for e in self.entries for i in e.items for a in i.answers if a and a.shown]
        return list({p.name: p for p in pictures if p.missing}.values())


def build_gallery(rows: Sequence[Row], *, count: int, seed: int) -> Gallery:
    """Draw pictures at random, blind to every score.

    Args:
        rows: Systems, in column order; those without predictions are left out.
        count: How many pictures.
        seed: Seed of the draw (pictures and questions).

    Returns:
        The gallery; the pool is every picture that some system was asked about. Those that all were asked about come first.
    """
    rows = [row for row in rows if row.predictions]
    asked = [_by_picture(row) for row in rows]
    # No score enters the draw, so nobody can be shown only the pictures on which a system shines.
    rng = random.Random(seed)
    common = set.intersection(*(set(a) for a in asked)) if asked else set()
    # Without a common picture (a captioner and an MLLM on different sets) any is better than none.
    names = _shuffled(common, rng) + _shuffled({name for a in asked for name in a} - common, rng)
    drawn = names[:count]
    cache: dict[tuple[str, int], Picture] = {}
    entries = [_entry(name, rows, asked, rng, cache) for name in drawn[:SAMPLE]]
    return Gallery([row.label for row in rows], entries, len(names), drawn, asked)


def _shuffled(names: set[str], rng: random.Random) -> list[str]:
    """In an order that depends on the seed alone; a smaller gallery is the beginning of a larger one."""
    # File names decide the order, not folders: the same data elsewhere gives the same gallery.
    ordered = sorted(names, key=lambda name: (Path(name).name, name))
    rng.shuffle(ordered)
    return ordered


def truth_of(references: Sequence[str]) -> str:
    """The answers people gave, most frequent first, with counts where they disagree."""
    # Three of the up to ten answers say where people agreed; the rest would fill the column.
    counts = Counter(references).most_common(3)
    # Counts matter only where people disagree.
    if len(counts) <= 1:
        return counts[0][0] if counts else ""
    return ", ".join(f"{text} ({n})" for text, n in counts)


def mark_of(prediction: Prediction) -> tuple[str, str]:
    """Right, partly or wrong for answers; captions have a figure only."""
    # A caption is neither right nor wrong, and CIDEr has no threshold that would make it so.
    if "CIDEr" in prediction.score:
        return "", f"CIDEr {prediction.score['CIDEr'] * 100:.0f}"
    accuracy = figure_of(prediction, "accuracy")
    if accuracy is None:
        # Of a suite that scores its samples otherwise, its own first figure.
        return "", next((f"{name} {value:.3g}" for name, value in prediction.score.items()), "")
    if accuracy >= 1 - 1e-9:
        return "right", ""
    return ("partly", f"{accuracy * 100:.0f} %") if accuracy > 0 else ("wrong", "")


def figure_of(prediction: Prediction, metric: str) -> float | None:
    """A sample's figure on one metric, None where it has none."""
    # A rotation of MMBench is right or wrong, but only a question with all its rotations has an accuracy.
    return prediction.score.get(metric, prediction.score.get("correct") if metric == "accuracy" else None)


def _by_picture(row: Row) -> Asked:
    found: Asked = {}
    for run in row.runs:
        for p in run.predictions:
            # Systems may spell one path differently, and pictures are joined by it.
            found.setdefault(os.path.normpath(p.image), {})[p.task, p.id] = (p, run)
    return found


def _entry(
    name: str,
    rows: Sequence[Row],
    asked: Sequence[Asked],
    rng: random.Random,
    cache: dict[tuple[str, int], Picture],
) -> Entry:
    """One picture with its caption and at most QUESTIONS of its questions."""
    here = [a.get(name, {}) for a in asked]
    keys = list(dict.fromkeys(key for answers in here for key in answers))
    first = {key: next(answers[key] for answers in here if key in answers) for key in keys}
    captions = [key for key in keys if not first[key][0].question]
    # Sorted before the draw: the order in which a system answered must not choose the questions.
    questions = sorted(key for key in keys if first[key][0].question)
    drawn = set(rng.sample(questions, min(QUESTIONS, len(questions))))
    # Those drawn go back into the order of the data set.
    chosen = captions + [key for key in keys if key in drawn]
    picture = _cached(name, first[keys[0]][1], SHOWN, cache)
    items: list[Item] = []
    for key in chosen:
        above = items[-1].answers if items else [None] * len(rows)
        items.append(_item(key, first[key][0], [answers.get(key) for answers in here], above, cache))
    # The rest is counted and told, so that four questions do not pass for all.
    return Entry(picture, items, len(keys) - len(chosen))


def _item(
    key: tuple[str, str],
    first: Prediction,
    found: Sequence[tuple[Prediction, Run] | None],
    above: Sequence[Answer | None],
    cache: dict[tuple[str, int], Picture],
) -> Item:
    """Captions show one truth and keep the others for a fold-out; answers are counted."""
    if first.question:
        truth, more = truth_of(first.references), []
    else:
        truth, more = (first.references[0] if first.references else ""), first.references[1:]
    answers = [None if pair is None else _answer(*pair, up, cache) for pair, up in zip(found, above, strict=True)]
    return Item(*key, first.question or "", truth, more, answers)


def _answer(prediction: Prediction, run: Run, above: Answer | None, cache: dict[tuple[str, int], Picture]) -> Answer:
    """With the picture really shown, where that was another one."""
    # Told by the pictures, not by a flag of the run: what counts is what this system saw.
    blind = os.path.normpath(prediction.image_shown) != os.path.normpath(prediction.image)
    shown = _cached(prediction.image_shown, run, THUMB, cache) if blind else None
    return Answer(prediction.text, *mark_of(prediction), shown, above is not None and above.shown == shown)


def _cached(name: str, run: Run, side: int, cache: dict[tuple[str, int], Picture]) -> Picture:
    """A blind system is often shown the same picture for several questions: read it once."""
    # The size belongs to the key: a picture may be an entry here and a blind system's stand-in there.
    if (name, side) not in cache:
        cache[name, side] = read_picture(name, run, side=side)
    return cache[name, side]
