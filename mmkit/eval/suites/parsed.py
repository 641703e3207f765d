"""What suites share that parse a choice out of an answer: means over parts, breakdowns, counts of odd answers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from mmkit.eval.result import LONG_ANSWER_WORDS, Settings, answer_shapes
from mmkit.eval.statistics import Floats, bootstrap_ci, ratio_of_sums


def part_means(values: Mapping[str, Floats], clusters: Sequence[Hashable], s: Settings) -> tuple[dict[str, float], Floats | None]:
    """Means of several metrics, each over its own part of the samples, with cluster bootstrap intervals.

    Args:
        values: Metric -> f64[N]; NaN where a sample is no part of that mean.
        clusters: N labels; the samples of one label are drawn together.
        s: Gives number and seed of the resamples.

    Returns:
        Metric -> mean, and f64[M, 2] intervals or None; a metric without any sample is left out.
    """
    values = {name: column for name, column in values.items() if not np.isnan(column).all()}
    # As totals and counts: a resample changes how many samples of a part there are.
    stacked = np.stack(list(values.values()), axis=1)
    columns = np.concatenate([np.nan_to_num(stacked), ~np.isnan(stacked)], axis=1)
    means = ratio_of_sums(columns.sum(axis=0, keepdims=True))[0]
    intervals = bootstrap_ci(columns, clusters=clusters, resamples=s.bootstrap, seed=s.seed) if s.bootstrap else None
    return dict(zip(values, means.tolist(), strict=True)), intervals


def breakdown(values: Sequence[float], labels: Sequence[str], order: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """Accuracy and number of samples of each label.

    Args:
        values: N scores.
        labels: N labels; samples without one ("") are left out.
        order: Labels in the order to show; those that are not in it follow, sorted.

    Returns:
        Label -> ``{"accuracy", "n"}``; labels without a sample are left out.
    """
    groups: dict[str, list[float]] = {}
    for value, label in zip(values, labels, strict=True):
        if label:
            groups.setdefault(label, []).append(value)
    # The official order where there is one, so that tables read like the papers'.
    names = [*(name for name in order if name in groups), *sorted(groups.keys() - set(order))]
    return {name: {"accuracy": sum(groups[name]) / len(groups[name]), "n": len(groups[name])} for name in names}


def count_answers(
    answers: Sequence[str], *, unparsed: int, defaulted: int = 0, exact: bool = False, means: str = "are counted as wrong"
) -> tuple[dict[str, int], list[str]]:
    """Count answers of the wrong shape.

    Args:
        answers: What the model said.
        unparsed: How many the rule could not read.
        defaulted: How many the rule took for something that they do not say.
        exact: Whether the rule only knows short answers, so that long ones deserve a warning.
        means: What happens to the unparsed ones, for the warning.

    Returns:
        The ``answers`` part of a score, and the warnings.
    """
    # A sentence is fine for a rule that looks for a word in it.
    counts, notes = answer_shapes(answers, long_words=LONG_ANSWER_WORDS if exact else None)
    # Counted under every rule, warned of only where it matters.
    counts["long"] = sum(len(answer.split()) > LONG_ANSWER_WORDS for answer in answers)
    if unparsed:
        notes.append(f"{unparsed} of {len(answers)} answers could not be parsed and {means}")
    return {**counts, "unparsed": unparsed, "defaulted": defaulted}, notes


def sample_rows(ids: Sequence[Any], parsed: Sequence[str], scores: Mapping[str, Floats]) -> list[dict[str, Any]]:
    """The ``per_sample`` part of a score: id, what was parsed out of the answer, and its scores.

    Args:
        ids: N ids.
        parsed: N texts.
        scores: Metric -> f64[N]; NaN where a sample is no part of that metric, whose name its row then lacks.
    """
    rows: list[dict[str, Any]] = [{"id": key, "parsed": text} for key, text in zip(ids, parsed, strict=True)]
    for name, values in scores.items():
        for row, value in zip(rows, values.tolist(), strict=True):
            if not np.isnan(value):
                row[name] = value
    return rows
