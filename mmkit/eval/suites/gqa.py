"""GQA (Hudson & Manning 2019): questions generated from scene graphs, one true answer each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.examples import Example, fill_prompt, picture_file, required
from mmkit.eval.result import Score, Settings, refuse_questions
from mmkit.eval.scorers import gqa
from mmkit.eval.scorers.formats import VqaQuestion, match_results, read_results
from mmkit.eval.scorers.json_files import Source
from mmkit.eval.statistics import Figures, Floats
from mmkit.eval.suites.answers import score_answers
from mmkit.eval.suites.suite import Predictions, Suite
from mmkit.files import write_json


def examples(config: TaskConfig) -> list[Example]:
    """An example for each question of the file, balanced or not.

    Args:
        config: ``annotations`` is the question file, which has the answers; that of a test set is ``questions``.

    Returns:
        Examples in the order of the file.

    Raises:
        InputError: Broken files, nothing to score, or a picture's name that cannot be made.
    """
    if config.annotations is not None:
        refuse_questions(config.questions, config.task)
    answers = config.annotations is not None
    asked = gqa.read_gqa(config.annotations or required(config, "questions"), answers=answers)
    if answers:
        # Whatever scoring would refuse, before hours of answers.
        balanced = _balanced(asked, str(config.annotations))
        if config.settings.get("choices") is not None:
            gqa.read_choices(str(config.settings["choices"]), balanced)
    return [
        Example(
            key,
            (picture_file(config, q.image_id, None, "{}.jpg"),),
            fill_prompt(config, question=q.question),
            q.question,
            [q.answer] if answers else [],
            q.structural,
        )
        for key, q in asked.items()
    ]


def _balanced(asked: Mapping[str, gqa.GqaQuestion], where: str) -> list[str]:
    """Ids of the balanced questions.

    Raises:
        InputError: There are none.
    """
    found = [key for key, q in asked.items() if q.balanced]
    if not found:
        raise InputError("no question is balanced, and only those are scored", where=where, mend="give a file that has some")
    return found


def rows(asked: Sequence[Example], predictions: Predictions) -> list[dict[str, Any]]:
    """The official rows, ``[{"questionId", "prediction"}]``, in the form that LLaVA gives them: the official rule is literal."""
    return [{"questionId": e.id, "prediction": gqa.rule_llava(predictions[e.id], "")[0]} for e in asked]


def submit(folder: Path, asked: Sequence[Example], predictions: Predictions) -> Path:
    """Write what EvalAI's GQA challenge takes.

    Args:
        folder: Where to write.
        asked: The questions that were asked; the server wants all of the split.
        predictions: Answer of each, by id.

    Returns:
        The file, ``[{"questionId", "prediction"}]``.
    """
    path = folder / "gqa_submission.json"
    write_json(path, rows(asked, predictions))
    return path


def score_gqa(task: str, predictions: Source, annotations: Source, questions: Source | None, s: Settings) -> Score:
    """Score GQA: accuracy over the balanced questions, binary and open ones apart, by type; distribution; and what files allow.

    Args:
        task: Name for messages and for the result.
        predictions: ``[{"questionId", "prediction"}]``, or LLaVA's answers (JSON lines of ``question_id`` and ``text``);
            answers to questions that are not balanced serve consistency alone.
        annotations: The question file.
        questions: Must be None: the annotations are the questions.
        s: Settings; ``rule`` is a key of `mmkit.eval.scorers.gqa.RULES`, ``choices`` the path of a choices file.

    Returns:
        The design's score object. ``distribution`` (lower is better), ``consistency``, ``validity`` and ``plausibility`` are
        left out where the files do not have what one needs, and the settings say so. The draws behind the interval of
        ``distribution`` are centred on the figure (`mmkit.eval.statistics.Figures`).

    Raises:
        InputError: See `mmkit.eval.scorers.gqa`.
    """
    refuse_questions(questions, task)
    rule_name = s.choice("rule", gqa.RULES, "llava")
    rule = gqa.RULES[rule_name]
    asked = gqa.read_gqa(annotations)
    balanced = _balanced(asked, str(annotations) if isinstance(annotations, (str, Path)) else "annotations")
    given, name = read_results(predictions, key="questionId", text="prediction", of=str, llava=("question_id", "text"))
    # Of testdev_all most questions are not balanced: they are asked so that consistency can be scored.
    beside = {key: text for key, text in given.items() if key in asked and not asked[key].balanced}
    results = {key: text for key, text in given.items() if key not in beside}
    # Unknown ids are still among the results, and are refused here.
    ids = match_results(results, balanced, kind="question", name=name, allow_missing=s.allow_missing)
    processed = {key: rule(text, asked[key].answer) for key, text in given.items()}
    figures, how = _figures(asked, ids, processed, s.options.get("choices"))
    known = {key: _as_vqa(key, asked[key]) for key in balanced}
    return score_answers(
        task,
        results,
        name,
        known,
        s,
        # Processed once for all figures, not by the text that is handed in.
        lambda text, q: float(len(set(processed[str(q.question_id)])) == 1),
        settings={"rule": rule_name, "evaluator": gqa.RULE_SOURCES[rule_name], "questions": "balanced", **how},
        parts={"accuracy": lambda q: asked[str(q.question_id)].kind},
        breakdowns={
            "structural": lambda q: asked[str(q.question_id)].structural,
            "semantic": lambda q: asked[str(q.question_id)].semantic,
            "detailed": lambda q: asked[str(q.question_id)].detailed,
        },
        extra=lambda _: figures,
    )


def _as_vqa(key: str, question: gqa.GqaQuestion) -> VqaQuestion:
    """The question in the form that suites of open answers share."""
    return VqaQuestion(key, question.image_id, [{"answer": question.answer}], question=question.question)


def _figures(
    asked: Mapping[str, gqa.GqaQuestion], ids: Sequence[str], processed: Mapping[str, tuple[str, str]], choices: str | None
) -> tuple[Figures, dict[str, str]]:
    """Figures of the whole set, and what the settings say about each: how it was made, or why it is not there."""
    spread = gqa.Distribution([(asked[key].group, processed[key][1], processed[key][0]) for key in ids])
    how = {"distribution": "weighted chi-square / 100, lower is better" if spread.known else "no groups"}
    # The other figures are means over the questions that have a value.
    means: dict[str, Floats] = {}
    lacking = gqa.unanswered(asked, ids, processed)
    if lacking:
        # testdev_balanced entails questions of testdev_all, which LLaVA does not ask either.
        how["consistency"] = f"not scored: {lacking} entailed questions are not in the file or have no answer"
    else:
        # By the processed answers, balanced or not, so that all figures follow one rule.
        right = {key: prediction == answer for key, (prediction, answer) in processed.items()}
        shares = gqa.consistency(asked, ids, right)
        entails = not np.isnan(shares).all()
        how["consistency"] = "entailed questions of right answers" if entails else "nothing is entailed"
        means |= {"consistency": shares} if entails else {}
    if choices is None:
        how["validity"] = how["plausibility"] = "not scored: no choices file (choices=PATH; none is released for testdev)"
    else:
        lists = gqa.read_choices(choices, ids)
        for place, metric in enumerate(("validity", "plausibility")):
            hits = [gqa.belongs(processed[key][0], lists[key][place], asked[key]) for key in ids]
            means[metric], how[metric] = np.array(hits, dtype=np.float64), "by the choices file"

    def of(weights: Floats) -> Floats:
        """The figures where each question counts so often."""
        first = [spread.of(weights)] if spread.known else []
        return np.array([*first, *(_mean(values, weights) for values in means.values())])

    names = ("distribution", *means) if spread.known else tuple(means)
    # Squares of differences: see `Figures`.
    return Figures(names, of, centred=("distribution",)), how


def _mean(values: Floats, weights: Floats) -> float:
    """Weighted mean of the values there are; NaN where none counts."""
    there = ~np.isnan(values)
    total = float(weights[there].sum())
    return float(weights[there] @ values[there]) / total if total else math.nan


SUITE = Suite("gqa", examples, score_gqa, rows, options=("rule", "choices"), submit=submit)
