"""VizWiz-VQA (Gurari et al. 2018): questions that blind people asked about their own photographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmkit.config import TaskConfig
from mmkit.eval.examples import Example, fill_prompt, picture_file, required
from mmkit.eval.result import Score, Settings, refuse_questions
from mmkit.eval.scorers import vizwiz
from mmkit.eval.scorers.formats import check_results, load_rows
from mmkit.eval.scorers.json_files import Source
from mmkit.eval.scorers.normalise import normalise_m4c
from mmkit.eval.scorers.vqa import RULE_SOURCES, Rule, leave_one_out, rule_m4c
from mmkit.eval.statistics import Figures, Floats
from mmkit.eval.suites.answers import score_answers
from mmkit.eval.suites.suite import Predictions, Suite
from mmkit.files import write_json

# Rule -> its functions and the key of its source. lmms-eval has M4C's processing on both sides, which gives more.
RULES: dict[str, tuple[Rule, str]] = {"official": (vizwiz.rule_vizwiz, "vizwiz"), "m4c": (rule_m4c, "m4c")}


def examples(config: TaskConfig) -> list[Example]:
    """An example for each picture, which has one question.

    Args:
        config: ``annotations`` (val.json); for the test set, whose answers the server keeps, ``questions`` (test.json).

    Returns:
        Examples in the order of the file.

    Raises:
        InputError: Broken files, or a picture's name that cannot be made.
    """
    if config.annotations is not None:
        refuse_questions(config.questions, config.task)
    file = config.annotations or required(config, "questions")
    return [
        Example(
            key,
            (picture_file(config, key, key, "{}"),),
            fill_prompt(config, question=q.question),
            q.question,
            [answer["answer"] for answer in q.answers],
            q.answer_type,
        )
        for key, q in vizwiz.read_vizwiz(file, answers=config.annotations is not None).items()
    ]


def rows(asked: Sequence[Example], predictions: Predictions) -> list[dict[str, Any]]:
    """VizWiz's result rows, ``[{"image", "answer"}]``."""
    return [{"image": e.id, "answer": predictions[e.id]} for e in asked]


def submit(folder: Path, asked: Sequence[Example], predictions: Predictions) -> Path:
    """Write what the VizWiz challenge takes, as LLaVA's convert_vizwiz_for_submission does: answers in the M4C form.

    Args:
        folder: Where to write.
        asked: The questions that were asked.
        predictions: Answer of each, by id.

    Returns:
        The file, ``[{"image", "answer"}]``.
    """
    path = folder / "vizwiz_submission.json"
    write_json(path, [{"image": e.id, "answer": normalise_m4c(predictions[e.id])} for e in asked])
    return path


def score_vizwiz(task: str, predictions: Source, annotations: Source, questions: Source | None, s: Settings) -> Score:
    """Score VizWiz answers, overall and by answer type; and confidences that a question can be answered, where there are some.

    Args:
        task: Name for messages and for the result.
        predictions: ``[{"image", "answer", "answerable"?}]``; ``answerable`` from 0 to 1, in all rows or in none.
        annotations: VizWiz annotations; they hold the questions.
        questions: Must be None.
        s: Settings; ``rule`` is a key of `RULES`.

    Returns:
        The design's score object. With confidences it has ``unanswerable_average_precision`` and ``unanswerable_f1`` (from a
        confidence below one half), as the official evaluator computes them.

    Raises:
        InputError: See `mmkit.eval.scorers.vizwiz`.
    """
    refuse_questions(questions, task)
    chosen = s.choice("rule", RULES, "official")
    rule, source = RULES[chosen]
    known = vizwiz.read_vizwiz(annotations)
    # Loaded once, since the rows hold answers and confidences.
    data, name = load_rows(predictions)
    results = check_results(data, name, key="image", text="answer", of=str)
    sure = vizwiz.confidences(data, name)
    # Without confidences nothing needs the flags, which users' own files in this layout may lack.
    flags = vizwiz.answerable_flags(annotations) if sure else {}
    how = (
        "confidence of each row, unanswerable below 0.5" if sure else 'not scored: no row has "answerable", a number from 0 to 1'
    )
    return score_answers(
        task,
        results,
        name,
        known,
        s,
        # By place, as upstream leaves answers out.
        lambda text, q: leave_one_out(*rule(text, [a["answer"] for a in q.answers])),
        settings={"rule": chosen, "evaluator": RULE_SOURCES[source], "unanswerability": how},
        extra=(lambda ids: _unanswerability(ids, flags, sure)) if sure else None,
    )


def _unanswerability(ids: Sequence[str], flags: Mapping[str, int], sure: Mapping[str, float]) -> Figures:
    """How well the confidences tell what cannot be answered; the positive class is "unanswerable"."""
    positive = np.array([flags[key] == 0 for key in ids])
    # Turned round as upstream does: at exactly one half a question counts as answerable.
    scores = np.array([1.0 - sure[key] for key in ids])

    def of(weights: Floats) -> Floats:
        area = vizwiz.average_precision(positive, scores, weights)
        return np.array([area, vizwiz.f1_score(positive, scores > 0.5, weights)])

    return Figures(("unanswerable_average_precision", "unanswerable_f1"), of)


SUITE = Suite("vizwiz", examples, score_vizwiz, rows, options=("rule",), submit=submit)
