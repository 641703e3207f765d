"""Settings and layout of a score: the parts that every suite shares."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmkit.errors import InputError
from mmkit.eval.statistics import Floats, bootstrap_ci, ratio_of_sums

logger = logging.getLogger(__name__)

Score = dict[str, Any]
# Official answers are one to three words; a model that answers in sentences scores near zero, and should hear why.
LONG_ANSWER_WORDS = 5
# From this share on, long answers are no slips but the model's way of answering (LLaVA#1664: TextVQA 2.16 % in sentences).
MANY = 0.1


def nearest(value: str, known: Iterable[str]) -> str:
    """List the known names, the nearest one first."""
    names = list(known)
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}known: {', '.join(names)}"


@dataclass(frozen=True)
class Settings:
    """What the caller asked for.

    Attributes:
        options: Settings of the suite alone (``tokenizer``, ``rule``), as text; one that was not given is absent.
        allow_missing: Score the ids that have a result when some have none.
        bootstrap: Resamples behind the 95 % intervals; 0 leaves them out.
        seed: Seed of the resamples.
    """

    options: Mapping[str, str] = field(default_factory=dict)
    allow_missing: bool = False
    bootstrap: int = 1000
    seed: int = 0

    def choice(self, option: str, known: Iterable[str], default: str, *, any_case: bool = False) -> str:
        """An option's value, or its default.

        Args:
            option: Its name.
            known: Its values.
            default: The value where none was given.
            any_case: Whether letter case does not matter: a recipe's true is Python's True.

        Raises:
            InputError: The value is not known (with the nearest one).
        """
        names = list(known)
        chosen = self.options.get(option, default)
        chosen = chosen.lower() if any_case else chosen
        if chosen not in names:
            raise InputError(f"unknown {option} {chosen!r}", where=option, mend=nearest(chosen, names))
        return chosen


def refuse_questions(questions: object, task: str) -> None:
    """Refuse a question file that would have no effect: whoever gave it believes that it has one.

    Raises:
        InputError: There is one.
    """
    if questions is not None:
        raise InputError(f"questions does not apply to {task}", where="questions", mend="leave questions out")


def coverage(scored: int, known: int, s: Settings) -> dict[str, Any]:
    """Say how much of the set was scored, where less than all was allowed."""
    return {"allow_missing": True, "missing": known - scored, "scored": f"{scored} of {known}"} if s.allow_missing else {}


def make_score(
    task: str,
    metrics: Mapping[str, float],
    intervals: Floats | None,
    *,
    settings: Mapping[str, Any],
    per_sample: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
    **more: Any,
) -> Score:
    """Lay the score out as the design's JSON object.

    Args:
        task: Name of the suite.
        metrics: Name -> figure.
        intervals: f64[M, 2], a row for each metric in their order; None without a bootstrap.
        settings: What the figures depend on.
        per_sample: A row with ``id`` for each sample.
        notes: What a reader should know before trusting the numbers.
        **more: Further keys of the object, such as ``answers`` and ``breakdown``.
    """
    for note in notes:
        # In the log for whoever runs it, and in the settings below: a number that travels takes its caveat along.
        logger.warning("%s: %s", task, note)
    # Without a bootstrap there are no rows at all, hence strict=False below.
    rows = [] if intervals is None else intervals.tolist()
    # NaN is no JSON: a metric that no resample could give has no interval.
    ci95 = {name: row for name, row in zip(metrics, rows, strict=False) if not np.isnan(row).any()}
    return {
        "task": task,
        "metrics": dict(metrics),
        "ci95": ci95,
        "n": len(per_sample),
        "settings": {**settings, **({"notes": list(notes)} if notes else {})},
        "per_sample": list(per_sample),
        **more,
    }


def masked_means(values: Floats, masks: Mapping[str, Floats], clusters: Sequence[Hashable], s: Settings) -> tuple[Any, Any]:
    """Means over several parts of a set, with cluster bootstrap intervals.

    Args:
        values: f64[N].
        masks: Metric -> which samples it is the mean of, bool[N].
        clusters: N labels; the samples of one label are drawn together.
        s: Gives number and seed of the resamples.

    Returns:
        Metric -> mean, and f64[M, 2] intervals or None.
    """
    counts = np.stack(list(masks.values()), axis=1).astype(np.float64)
    # Totals and counts are both summed, since a resample changes how many samples of a part there are.
    columns = np.concatenate([values[:, None] * counts, counts], axis=1)
    metrics = dict(zip(masks, ratio_of_sums(columns.sum(axis=0, keepdims=True))[0].tolist(), strict=True))
    intervals = bootstrap_ci(columns, clusters=clusters, resamples=s.bootstrap, seed=s.seed) if s.bootstrap else None
    return metrics, intervals


def answer_shapes(
    answers: Sequence[str],
    *,
    long_words: int | None = LONG_ANSWER_WORDS,
    references: Sequence[Sequence[str]] | None = None,
    unparsed: int = 0,
) -> tuple[dict[str, int], list[str]]:
    """Count answers that have the wrong shape for exact matching.

    Args:
        answers: What the model said.
        long_words: Words beyond which an answer can hardly match; None where any length is fine.
        references: True answers of each; an answer that is no longer than one of them is not long.
        unparsed: Answers that the rule could not read.

    Returns:
        The ``answers`` part of a score (total, empty, long, unparsed, defaulted), and the warnings about them.
    """
    counts = {"total": len(answers), "empty": sum(not answer.strip() for answer in answers), "long": 0}
    counts |= {"unparsed": unparsed, "defaulted": 0}
    notes = []
    if long_words is not None:
        over = [(n, words) for n, words in enumerate(len(answer.split()) for answer in answers) if words > long_words]
        # A sign that reads "no parking at any time here" is answered in as many words.
        fits = [max((len(text.split()) for text in references[n]), default=0) if references else 0 for n, _ in over]
        counts["long"] = sum(words > most for (_, words), most in zip(over, fits, strict=True))
        if counts["long"]:
            notes.append(_long_note(counts["long"], len(answers), long_words))
    if unparsed:
        notes.append(f"{unparsed} of {len(answers)} answers could not be parsed and count as wrong")
    if counts["empty"]:
        notes.append(f"{counts['empty']} of {len(answers)} answers are empty")
    return counts, notes


def _long_note(count: int, total: int, long_words: int) -> str:
    """A remark on a few long answers; a warning where they are the rule."""
    if count < MANY * total:
        return f"{count} of {total} answers have more than {long_words} words and can hardly match"
    return (
        f"WARNING: {count} of {total} answers have more than {long_words} words ({count / total:.0%}): sentences score about 0 "
        "by a rule of exact match, however right they are. Ask for a single word or phrase in the prompt, as LLaVA does"
    )
