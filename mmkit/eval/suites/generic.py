"""Users' own questions, on pictures or without: JSON or JSON lines, and a metric of a small set or of another package."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.examples import Example, Id, fill_prompt, picture_file, required
from mmkit.eval.result import LONG_ANSWER_WORDS, Score, Settings, refuse_questions
from mmkit.eval.scorers import own
from mmkit.eval.scorers.formats import ANSWERS, Source, VqaQuestion, listed, load_rows, refuse_repeated
from mmkit.eval.suites.answers import score_answers
from mmkit.eval.suites.suite import Predictions, Suite

_SHAPE = '{"id": 1, "image": "a.jpg", "question": "...", "answers": ["..."]}'


class Row(NamedTuple):
    """One question of the user's file."""

    id: Id
    images: tuple[str, ...]
    question: str
    answers: list[str]
    type: str


def read_questions(source: Source, *, answers: bool = True) -> dict[Id, Row]:
    """Read a user's questions.

    Args:
        source: JSON list or JSON lines of ``{"id", "image" or "images" or neither, "question", "answers": [..], "type"?}``.
        answers: Whether they have answers, at least one each.

    Returns:
        Id -> question, in file order.

    Raises:
        InputError: Fields missing or of the wrong type, or ids that come twice.
    """
    rows, name = load_rows(source, "questions")
    faults = [f"row {n}{_who(row)} {fault}" for n, row in enumerate(rows, start=1) if (fault := _fault(row, answers))]
    if faults:
        raise InputError(listed(faults), where=name, mend=f"write rows such as {_SHAPE}")
    refuse_repeated([row["id"] for row in rows], kind="question", name=name)
    return {row["id"]: _row(row, answers) for row in rows}


def _who(row: object) -> str:
    """The id of a row, for a message."""
    return f" (id {row['id']!r:.40})" if isinstance(row, dict) and "id" in row else ""


def _is_id(value: object) -> bool:
    """A whole number or a text; True is an int to Python."""
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _fault(row: Any, answers: bool) -> str | None:
    """What is wrong with a row."""
    if not isinstance(row, dict):
        return f"is {type(row).__name__}, not an object"
    if not _is_id(row.get("id")):
        return 'has no "id" that is a whole number or a text'
    if not isinstance(row.get("question"), str):
        return 'has no text "question"'
    if not isinstance(row.get("type", ""), str):
        return 'has a "type" that is no text'
    if "image" in row and "images" in row:
        return 'has both "image" and "images"'
    # "image": null is how tables write a question without a picture.
    if not isinstance(row.get("image"), (str, type(None))) or not _texts(row.get("images", [])):
        return 'has pictures that are not a file name ("image") or a list of them ("images")'
    given = row.get("answers")
    if answers and not (_texts(given) and given):
        return 'has no list "answers" of one text or more'
    return None


def _texts(value: object) -> bool:
    """A list of texts, which may be empty."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _row(row: dict[str, Any], answers: bool) -> Row:
    """A checked row."""
    images = row["images"] if "images" in row else [row["image"]] if row.get("image") is not None else []
    return Row(row["id"], tuple(images), row["question"], row["answers"] if answers else [], row.get("type", ""))


def examples(config: TaskConfig) -> list[Example]:
    """An example for each question.

    Args:
        config: ``annotations`` (or ``questions`` for a file without answers); pictures are relative to ``image_root``, by default
            the folder of the file.

    Returns:
        Examples in the order of the file.

    Raises:
        InputError: See `read_questions`; or a picture's name leads out of the root.
    """
    if config.annotations is not None:
        refuse_questions(config.questions, config.task)
    file = config.annotations or required(config, "questions")
    if config.image_root is None:
        config = config.model_copy(update={"image_root": str(Path(file).parent)})
    return [
        Example(
            row.id,
            tuple(picture_file(config, row.id, name, "{}") for name in row.images),
            fill_prompt(config, question=row.question),
            row.question,
            row.answers,
            row.type,
        )
        for row in read_questions(file, answers=config.annotations is not None).values()
    ]


def rows(asked: Sequence[Example], predictions: Predictions) -> list[dict[str, Any]]:
    """Result rows, ``[{"id", "prediction"}]``: fields that the rows of a run's predictions.jsonl have, too."""
    return [{"id": e.id, "prediction": predictions[e.id]} for e in asked]


def read_predictions(source: Source) -> tuple[dict[Id, str], str]:
    """Read answers.

    Args:
        source: JSON list or JSON lines of ``{"id", "prediction"}``; other fields are passed over.

    Returns:
        Id -> answer, and the name of the file for messages.

    Raises:
        InputError: Fields missing or of the wrong type, or ids that come twice.
    """
    found, name = load_rows(source, "predictions")
    faults = [
        f"row {n}{_who(row)} is no object with an id and a text"
        for n, row in enumerate(found, start=1)
        if not isinstance(row, dict) or not _is_id(row.get("id")) or not isinstance(row.get("prediction"), str)
    ]
    if faults:
        raise InputError(listed(faults), where=name, mend='write rows such as {"id": 1, "prediction": "..."}')
    refuse_repeated([row["id"] for row in found], kind="question", name=name)
    return {row["id"]: row["prediction"] for row in found}, name


def score_generic(task: str, predictions: Source, annotations: Source, questions: Source | None, s: Settings) -> Score:
    """Score answers to a user's own questions; ``accuracy`` is the mean of the metric, ``breakdown`` that of each type.

    Args:
        task: Name for messages and for the result.
        predictions: See `read_predictions`.
        annotations: See `read_questions`.
        questions: Must be None: the annotations are the questions.
        s: Settings; ``metric`` is a name of `mmkit.eval.scorers.own.metric_names` (default exact), ``tolerance`` that of numeric.

    Returns:
        The design's score object. Questions about one picture, or the same ones, are drawn together.

    Raises:
        InputError: See the readers; or an unknown metric, one that does not fit the answers, or a scorer's score beyond [0, 1].
    """
    refuse_questions(questions, task)
    name = s.options.get("metric", "exact")
    metric, source = own.find_metric(name)
    settings: dict[str, Any] = {"metric": name, "evaluator": source}
    if name == "numeric":
        settings["tolerance"] = _tolerance(s)
        metric = functools.partial(own.numeric, tolerance=settings["tolerance"])
    elif "tolerance" in s.options:
        raise InputError(f"tolerance does not apply to metric={name}", where="tolerance", mend="leave it out, or metric=numeric")
    asked = read_questions(annotations)
    _check_fit(asked, name, str(annotations) if isinstance(annotations, (str, Path)) else "annotations")
    results, file = read_predictions(predictions)
    _refuse_other_kind(results, asked, file)
    known = {
        key: VqaQuestion(key, "\n".join(row.images) or f"question {key}", [{"answer": a} for a in row.answers], row.type)
        for key, row in asked.items()
    }
    return score_answers(
        task,
        results,
        file,
        known,
        s,
        lambda text, q: metric(text, [a["answer"] for a in q.answers]),
        settings=settings,
        parts={},
        breakdowns={"type": lambda q: q.answer_type},
        long_words=LONG_ANSWER_WORDS if name in own.SHORT else None,
        unparsed=(lambda text: own.last_number(text) is None) if name == "numeric" else None,
    )


def _tolerance(s: Settings) -> float:
    """The setting as a number."""
    text = s.options.get("tolerance", "0")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise InputError(f"tolerance is a share from 0 to 1, not {text!r}", where="tolerance", mend="tolerance=0.05")
    return value


def _check_fit(asked: dict[Id, Row], metric: str, name: str) -> None:
    """Refuse answers that a metric cannot use: it would score them as wrong, whatever the model says."""
    if metric in own.TEN_ANSWERS:
        odd = [f"question {key} has {len(row.answers)}" for key, row in asked.items() if len(row.answers) != ANSWERS]
        if odd:
            mend = "use metric=normalised, where one matching answer is enough"
            raise InputError(f"metric={metric} needs {ANSWERS} answers a question: {listed(odd)}", where=name, mend=mend)
    if metric == "numeric":
        bare = [key for key, row in asked.items() if all(own.last_number(answer) is None for answer in row.answers)]
        if bare:
            what = f"metric=numeric, but no answer has a number for question {listed(bare)}"
            raise InputError(what, where=name, mend="use another metric, or leave those questions out")


def _refuse_other_kind(results: dict[Id, str], asked: dict[Id, Row], name: str) -> None:
    """Say so where ids are numbers in one file and texts in the other: they look the same in a list of unknown ones."""
    kinds = {str(key): key for key in asked}
    odd = [key for key in results if key not in asked and str(key) in kinds]
    if odd:
        what = f"ids are {type(odd[0]).__name__} here and {type(kinds[str(odd[0])]).__name__} in the questions: {listed(odd)}"
        raise InputError(what, where=name, mend="write them the same way in both files")


SUITE = Suite("generic", examples, score_generic, rows, options=("metric", "tolerance"))
