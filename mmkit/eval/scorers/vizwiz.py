"""VizWiz-VQA (Gurari et al. 2018): rule of the challenge's own evaluator, its files, and how well unanswerable is told.

Source: the VizWiz API's ``vqaEval.py`` (Qing Li), whose port in TRI-ML/vlm-evaluation agrees but for the apostrophes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mmkit.errors import InputError
from mmkit.eval.scorers.formats import VqaQuestion, check_answers, check_rows
from mmkit.eval.scorers.json_files import Source, listed, load_json, refuse_repeated
from mmkit.eval.scorers.normalise import (
    CONTRACTIONS,
    DIGITS_VIZWIZ,
    clean,
    process_digits_and_articles,
    process_punctuation,
    word_table,
)

# An editor has replaced the apostrophes of upstream's table, all but these: "dont" becomes "don’t", which people do not type.
_PLAIN_KEYS = frozenset({"couldn'tve", "hadn'tve"})
_PLAIN_VALUES = frozenset({"ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"})
TYPOGRAPHIC = {
    key if key in _PLAIN_KEYS else key.replace("'", "’"): value if value in _PLAIN_VALUES else value.replace("'", "’")
    for key, value in CONTRACTIONS.items()
}
_WORDS = word_table(TYPOGRAPHIC)


@lru_cache(maxsize=1 << 16)
def normalise_vizwiz(text: str) -> str:
    """VQA's processing with the typographic apostrophes of VizWiz's contraction table."""
    return process_digits_and_articles(process_punctuation(clean(text), DIGITS_VIZWIZ), _WORDS)


def rule_vizwiz(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    """The official rule: the prediction processed in full, the human answers untouched, not even lower-cased.

    Args:
        prediction: The model's answer.
        answers: The human answers.

    Returns:
        Prediction and answers as they are compared.
    """
    return normalise_vizwiz(prediction), list(answers)


def read_vizwiz(source: Source, *, answers: bool = True) -> dict[str, VqaQuestion]:
    """Read a VizWiz file.

    Args:
        source: ``[{"image", "question", "answers": [{"answer"}] * 10, "answer_type"?}]`` or a path to it.
        answers: Whether there are any; the file of the test set has none.

    Returns:
        Image name -> question, in file order: a picture has one question, and its name is the question's id.

    Raises:
        InputError: Fields missing or of the wrong type, other than ten answers, or repeated pictures.
    """
    data, name = load_json(source, "annotations" if answers else "questions")
    if not isinstance(data, list) or not data:
        what = "no rows in the file" if data == [] else f"a VizWiz file is a list, this is {type(data).__name__}"
        raise InputError(what, where=name, mend="give val.json of VizWiz-VQA")
    check_rows(data, {"image": str, "question": str}, kind="question", key="image", name=name)
    # No rule needs the types: they give parts, where the file has them.
    typed = [row for row in data if "answer_type" in row]
    check_rows(typed, {"answer_type": str}, kind="question", key="image", name=name)
    refuse_repeated([row["image"] for row in data], kind="image", name=name)
    if answers:
        check_answers(data, name, dict, key="image")
    return {
        (key := row["image"]): VqaQuestion(
            key, key, row["answers"] if answers else [], row.get("answer_type", ""), question=row["question"]
        )
        for row in data
    }


def answerable_flags(annotations: Source) -> dict[str, int]:
    """The files' own flag of each question, by image.

    Args:
        annotations: As `read_vizwiz` has checked them.

    Raises:
        InputError: A question has none, or one that is neither 0 nor 1.
    """
    data, name = load_json(annotations, "annotations")
    wrong = [row["image"] for row in data if type(row.get("answerable")) is not int or row["answerable"] not in (0, 1)]
    if wrong:
        what = f'no "answerable" of 0 or 1 for {listed(wrong)}'
        raise InputError(what, where=name, mend="give the official file, or results without confidences")
    return {row["image"]: row["answerable"] for row in data}


def confidences(rows: Sequence[Any], name: str) -> dict[str, float]:
    """Confidences of a result file that its questions can be answered, by image; empty where no row has one.

    Args:
        rows: Result rows, checked otherwise; each may have ``answerable``, a number from 0 to 1.
        name: The file, for messages.

    Raises:
        InputError: Some rows have none, or one that is no number from 0 to 1.
    """
    # All or none: average precision over some of the questions is that of another set.
    found = {row["image"]: row["answerable"] for row in rows if "answerable" in row}
    wrong = [key for key, value in found.items() if type(value) not in (int, float) or not 0 <= value <= 1]
    if wrong:
        what = f'"answerable" is no number from 0 to 1 for {listed(wrong)}'
        raise InputError(what, where=name, mend="write the confidence that the question can be answered, 1 where it surely can")
    missing = [row["image"] for row in rows if "answerable" not in row] if found else []
    if missing:
        what = f'{len(missing)} of {len(rows)} rows have no "answerable": {listed(missing)}'
        raise InputError(what, where=name, mend="give every row its confidence, or none")
    return {key: float(value) for key, value in found.items()}


def average_precision(positive: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Area under the precision-recall steps, as scikit-learn's average_precision_score: sum of (R_n - R_n-1) P_n.

    Args:
        positive: bool[N].
        scores: f64[N]; equal ones are one step.
        weights: f64[N], how often each counts; once by default.

    Returns:
        In [0, 1]; 0 where nothing is positive.
    """
    labels, values = np.asarray(positive, dtype=bool), np.asarray(scores, dtype=np.float64)
    times = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    order = np.argsort(-values, kind="stable")
    # The last place of each run of equal scores: a threshold cannot part them.
    ends = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)
    hits, said = np.cumsum((labels * times)[order])[ends], np.cumsum(times[order])[ends]
    if hits[-1] == 0:
        return 0.0
    # maximum: before the first that counts nothing is said, and nothing hit.
    return float(np.sum(np.diff(hits / hits[-1], prepend=0.0) * hits / np.maximum(said, 1)))


def f1_score(positive: ArrayLike, predicted: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Harmonic mean of precision and recall of the positive class, 2 TP / (2 TP + FP + FN); 0 where nothing is either."""
    truth, said = np.asarray(positive, dtype=bool), np.asarray(predicted, dtype=bool)
    times = np.ones(len(truth)) if weights is None else np.asarray(weights, dtype=np.float64)
    total = float(times @ truth + times @ said)
    return 2 * float(times @ (truth & said)) / total if total else 0.0
