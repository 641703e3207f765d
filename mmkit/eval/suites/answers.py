"""What suites of open answers share: VQAv2, TextVQA, VizWiz, GQA and users' own data."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from mmkit.eval.result import LONG_ANSWER_WORDS, Score, Settings, answer_shapes, coverage, make_score, masked_means
from mmkit.eval.scorers import formats
from mmkit.eval.scorers.formats import VqaQuestion
from mmkit.eval.statistics import Figures, Floats, figures_ci
from mmkit.eval.suites.parsed import breakdown

# Part of the questions -> the label of a question in it; a question without a label ("") is in none.
Labels = Mapping[str, Callable[[VqaQuestion], str]]
ANSWER_TYPE: Labels = {"accuracy": lambda q: q.answer_type}


def score_answers(
    task: str,
    results: Mapping[Any, str],
    name: str,
    known: Mapping[Any, VqaQuestion],
    s: Settings,
    accuracy: Callable[[str, VqaQuestion], float],
    *,
    settings: Mapping[str, Any],
    parts: Labels = ANSWER_TYPE,
    breakdowns: Labels | None = None,
    beside: Mapping[str, Callable[[str, VqaQuestion], float]] | None = None,
    extra: Callable[[Sequence[Any]], Figures] | None = None,
    long_words: int | None = LONG_ANSWER_WORDS,
    unparsed: Callable[[str], bool] | None = None,
) -> Score:
    """Score every answer, then the means over all and over parts, with images as bootstrap clusters.

    Args:
        task: Name for messages and for the result.
        results: Question id -> answer.
        name: The result file, for messages.
        known: Annotated questions.
        s: Settings.
        accuracy: Score of one answer, in [0, 1].
        settings: What the figures depend on, beside what is common to all suites.
        parts: Metric -> label of a question; each label that occurs gives a metric ``accuracy_LABEL`` with its interval.
        breakdowns: Name -> label of a question; for tables of many rows, without intervals.
        beside: Further metrics of single answers.
        extra: Figures of the whole set, from the ids that are scored.
        long_words: See `answer_shapes`.
        unparsed: Whether the rule cannot read an answer.

    Returns:
        The design's score object.

    Raises:
        InputError: Ids are missing or unknown.
    """
    ids = formats.match_results(results, known.keys(), kind="question", name=name, allow_missing=s.allow_missing)
    questions, answers = [known[key] for key in ids], [results[key] for key in ids]
    columns = {"accuracy": np.array([accuracy(text, q) for text, q in zip(answers, questions, strict=True)])}
    for metric, rule in (beside or {}).items():
        columns[metric] = np.array([rule(text, q) for text, q in zip(answers, questions, strict=True)])
    # Questions on one picture are answered well or badly together, so pictures are what is drawn.
    clusters: list[Hashable] = [q.image_id for q in questions]
    metrics, intervals = _means(columns, parts, questions, clusters, s)
    if extra is not None:
        figures = extra(ids)
        metrics |= dict(zip(figures.names, figures.of(np.ones(len(ids))).tolist(), strict=True))
        if intervals is not None:
            more_intervals = figures_ci(figures, clusters, resamples=s.bootstrap, seed=s.seed)
            intervals = np.concatenate([intervals, more_intervals])
    counts, notes = answer_shapes(
        answers,
        long_words=long_words,
        references=[[entry["answer"] for entry in q.answers] for q in questions],
        unparsed=sum(map(unparsed, answers)) if unparsed is not None else 0,
    )
    more: dict[str, Any] = {"answers": counts}
    # Only for kinds that the files name.
    tables = {key: breakdown(columns["accuracy"].tolist(), [of(q) for q in questions]) for key, of in (breakdowns or {}).items()}
    if any(tables.values()):
        more["breakdown"] = {key: table for key, table in tables.items() if table}
    all_settings = {
        **settings,
        # The size that the interval depends on: questions of one picture count as one draw.
        "images": len(set(clusters)),
        "bootstrap": s.bootstrap,
        "seed": s.seed,
        **coverage(len(ids), len(known), s),
    }
    rows = zip(ids, *(values.tolist() for values in columns.values()), strict=True)
    per_sample = [{"id": key, **dict(zip(columns, row, strict=True))} for key, *row in rows]
    return make_score(task, metrics, intervals, settings=all_settings, per_sample=per_sample, notes=notes, **more)


def _means(
    columns: Mapping[str, Floats], parts: Labels, questions: Sequence[VqaQuestion], clusters: Sequence[Hashable], s: Settings
) -> tuple[dict[str, float], Floats | None]:
    """Means of all columns over all questions, and of the accuracy over each part; with intervals."""
    everything = np.ones(len(questions), dtype=bool)
    masks = {"accuracy": everything}
    for metric, of in parts.items():
        labels = np.array([of(q) for q in questions])
        # TextVQA has no answer types; its empty one gives no metric of its own.
        masks |= {f"{metric}_{label}": labels == label for label in sorted(set(labels.tolist()) - {""})}
    metrics, intervals = masked_means(columns["accuracy"], masks, clusters, s)
    for metric in list(columns)[1:]:
        # By the same seed: the draws are those of the accuracy.
        mean, interval = masked_means(columns[metric], {metric: everything}, clusters, s)
        metrics |= mean
        intervals = None if intervals is None else np.concatenate([intervals, interval])
    return metrics, intervals
