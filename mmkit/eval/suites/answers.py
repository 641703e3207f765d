"""What suites of ten human answers a question share: VQAv2, TextVQA, VizWiz."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import numpy as np

from mmkit.eval.result import Score, Settings, answer_shapes, coverage, make_score, masked_means
from mmkit.eval.scorers import formats
from mmkit.eval.scorers.formats import Source, VqaQuestion
from mmkit.eval.scorers.vqa import RULE_SOURCES


def score_answers(
    task: str,
    predictions: Source,
    known: Mapping[int, VqaQuestion],
    s: Settings,
    rule: str,
    accuracy: Callable[[str, VqaQuestion], float],
) -> Score:
    """Score every answer, then the means over all and over each answer type, with images as bootstrap clusters.

    Args:
        task: Name for messages and for the result.
        predictions: ``[{"question_id", "answer"}]``.
        known: Annotated questions.
        s: Settings.
        rule: A key of `RULE_SOURCES`.
        accuracy: Score of one answer, in [0, 1].

    Returns:
        The design's score object.

    Raises:
        InputError: See `mmkit.eval.scorers.formats`.
    """
    results, name = formats.read_results(predictions, key="question_id", text="answer")
    ids = formats.match_results(results, known.keys(), kind="question", name=name, allow_missing=s.allow_missing)
    values = np.array([accuracy(results[key], known[key]) for key in ids])
    types = np.array([known[key].answer_type for key in ids])
    # One mask a metric: all questions, then those of each type that occurs.
    masks = {"accuracy": np.ones(len(ids), dtype=bool)}
    # TextVQA has no answer types; its empty one gives no metric of its own.
    masks.update({f"accuracy_{kind}": types == kind for kind in sorted(set(types.tolist()) - {""})})
    # Questions on one picture are answered well or badly together, so pictures are what is drawn.
    clusters: list[Hashable] = [known[key].image_id for key in ids]
    metrics, intervals = masked_means(values, masks, clusters, s)
    settings = {
        "rule": rule,
        "evaluator": RULE_SOURCES[rule],
        # The size that the interval depends on: questions of one picture count as one draw.
        "images": len(set(clusters)),
        "bootstrap": s.bootstrap,
        "seed": s.seed,
        **coverage(len(ids), len(known), s),
    }
    per_sample = [{"id": key, "accuracy": value} for key, value in zip(ids, values.tolist(), strict=True)]
    counts, notes = answer_shapes([results[key] for key in ids])
    return make_score(task, metrics, intervals, settings=settings, per_sample=per_sample, notes=notes, answers=counts)
