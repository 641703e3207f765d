"""Users' own questions, on pictures or without: JSON or JSON lines, and a metric of a small set or of another package."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.examples import Example, Id, fill_prompt, picture_file, required
from mmkit.eval.result import LONG_ANSWER_WORDS, Score, Settings, refuse_questions
from mmkit.eval.scorers import own
from mmkit.eval.scorers.answer_files import Row, answer_rows, read_answers
from mmkit.eval.scorers.formats import ANSWERS, VqaQuestion
from mmkit.eval.scorers.json_files import Source, listed
from mmkit.eval.suites.answers import score_answers
from mmkit.eval.suites.suite import Predictions, Suite

_KEYS = ("id", "image", "images", "question", "answers", "type")
_SHAPE = '{"id": 1, "image": "a.jpg", "question": "...", "answers": ["..."]}'


class Question(NamedTuple):
    """One question of the user's file."""

    id: Id
    images: tuple[str, ...]
    question: str
    answers: list[str]
    type: str


def read_questions(source: Source, *, answers: bool = True) -> dict[Id, Question]:
    """Read a user's questions.

    Args:
        source: JSON list or JSON lines of ``{"id", "image" or "images" or neither, "question", "answers": [..], "type"?}``.
        answers: Whether they have answers, at least one each.

    Returns:
        Id -> question, in file order.

    Raises:
        InputError: Fields missing or of the wrong type, or ids that come twice; with file, line or row, and id.
    """
    found: dict[Id, tuple[str, Question]] = {}
    for row in answer_rows(source, ("id",), "questions"):
        key = own_id(row, ("id",))
        fault = _fault(row.data, answers)
        if fault:
            raise InputError(f"question {key} {fault}", where=row.where, mend=f"write rows such as {_SHAPE}")
        # Taking one of the two in silence would change the score.
        if key in found:
            what = f"a second question {key} (the first: {found[key][0]})"
            raise InputError(what, where=row.where, mend="give each an id of its own")
        found[key] = row.where, _question(key, row.data, answers)
    return {key: question for key, (_, question) in found.items()}


def own_id(row: Row, names: Sequence[str]) -> Id:
    """The id of a row: a whole number or a text, as the user has it.

    Raises:
        InputError: There is none, or it is neither.
    """
    value = row.data.get(names[0])
    # True is a whole number to Python.
    if not isinstance(value, (int, str)) or isinstance(value, bool):
        what = (
            f'no "{names[0]}" that is a whole number or a text, but {value!r:.40}' if names[0] in row.data else f'no "{names[0]}"'
        )
        raise InputError(what, where=row.where, mend="give each question an id")
    return value


def _fault(row: Mapping[str, Any], answers: bool) -> str | None:
    """What is wrong with a question."""
    if not isinstance(row.get("question"), str):
        return 'has no text "question"'
    if not isinstance(row.get("type", ""), str):
        return 'has a "type" that is no text'
    # Data sets have columns of their own; one that is nearly a known key is a slip that would leave a picture out in silence.
    for key in row.keys() - set(_KEYS):
        if near := difflib.get_close_matches(key, set(_KEYS) - row.keys(), 1, 0.8):
            return f'has a key "{key}"; did you mean "{near[0]}"?'
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


def _question(key: Id, row: Mapping[str, Any], answers: bool) -> Question:
    """A checked row."""
    images = row["images"] if "images" in row else [row["image"]] if row.get("image") is not None else []
    return Question(key, tuple(images), row["question"], row["answers"] if answers else [], row.get("type", ""))


def examples(config: TaskConfig) -> list[Example]:
    """An example for each question.

    Args:
        config: ``annotations`` (or ``questions`` for a file without answers); pictures are relative to ``image_root``, by default
            the folder of the file.

    Returns:
        Examples in the order of the file.

    Raises:
        InputError: See `read_questions`; answers that the metric of the settings cannot use; or a picture's name that leads out
            of the root.
    """
    if config.annotations is not None:
        refuse_questions(config.questions, config.task)
    file = config.annotations or required(config, "questions")
    # Published benchmarks keep pictures and questions apart; own data mostly lies in one folder.
    if config.image_root is None:
        config = config.model_copy(update={"image_root": str(Path(file).parent)})
    asked = read_questions(file, answers=config.annotations is not None)
    if config.annotations is not None:
        # Not after hours of answers, which the metric would then refuse.
        _check_fit(asked, str(config.settings.get("metric", "exact")), str(file))
    return [
        Example(
            row.id,
            tuple(picture_file(config, row.id, name, "{}") for name in row.images),
            fill_prompt(config, question=row.question),
            row.question,
            row.answers,
            row.type,
        )
        for row in asked.values()
    ]


def rows(asked: Sequence[Example], predictions: Predictions) -> list[dict[str, Any]]:
    """Result rows, ``[{"id", "prediction"}]``: fields that the rows of a run's predictions.jsonl have, too."""
    return [{"id": e.id, "prediction": predictions[e.id]} for e in asked]


def read_predictions(source: Source) -> dict[Id, str]:
    """Read answers.

    Args:
        source: JSON list or JSON lines of ``{"id", "prediction"}``, such as a run's predictions.jsonl of one task; "answer",
            "text" and "response" are other names of the text.

    Returns:
        Id -> answer.

    Raises:
        InputError: See `mmkit.eval.scorers.answer_files.read_answers`.
    """
    return {key: answer.text for key, answer in read_answers(source, ("id",), own_id).items()}


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
    results = read_predictions(predictions)
    file = str(predictions) if isinstance(predictions, (str, Path)) else "predictions"
    _refuse_other_kind(results, asked, file)
    # All its pictures together are what a question is about; without any it is drawn alone.
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
        # Types are the user's, and may be hundreds: a table, no metrics.
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
        value = math.nan  # refused below, as every other value that is no share
    if not 0 <= value < 1:
        raise InputError(f"tolerance is a share from 0 to 1, not {text!r}", where="tolerance", mend="tolerance=0.05")
    return value


def _check_fit(asked: dict[Id, Question], metric: str, name: str) -> None:
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


def _refuse_other_kind(results: dict[Id, str], asked: dict[Id, Question], name: str) -> None:
    """Say so where ids are numbers in one file and texts in the other: they look the same in a list of unknown ones."""
    kinds = {str(key): key for key in asked}
    odd = [key for key in results if key not in asked and str(key) in kinds]
    if odd:
        what = f"ids are {type(odd[0]).__name__} here and {type(kinds[str(odd[0])]).__name__} in the questions: {listed(odd)}"
        raise InputError(what, where=name, mend="write them the same way in both files")


SUITE = Suite("generic", examples, score_generic, rows, options=("metric", "tolerance"))
