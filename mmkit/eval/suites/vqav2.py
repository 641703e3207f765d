"""VQA v2 (GT-Vision-Lab/VQA): open answers against ten human ones."""

from __future__ import annotations

from pathlib import Path

from mmkit.config import TaskConfig
from mmkit.eval.examples import Example, fill_prompt, picture_file, required
from mmkit.eval.result import Score, Settings
from mmkit.eval.scorers import formats
from mmkit.eval.scorers.formats import Source
from mmkit.eval.scorers.vqa import RULES, vqa_accuracy
from mmkit.eval.suites.answers import score_answers
from mmkit.eval.suites.suite import Suite, question_rows
from mmkit.files import read_json


def examples(config: TaskConfig) -> list[Example]:
    """An example for each question.

    Args:
        config: Both ``annotations`` and ``questions``: VQA v2 keeps the texts of the questions apart.

    Returns:
        Examples in the order of the annotations.

    Raises:
        InputError: Broken files, files of different splits, or a picture's name that cannot be made.
    """
    known = formats.read_vqa(required(config, "annotations"), required(config, "questions"))
    texts = {row["question_id"]: row["question"] for row in read_json(Path(str(config.questions)))["questions"]}
    return [
        Example(
            i,
            (picture_file(config, q.image_id, None, "{:012d}.jpg"),),
            fill_prompt(config, question=texts[i]),
            texts[i],
            [answer["answer"] for answer in q.answers],
            q.answer_type,
        )
        for i, q in known.items()
    ]


def score_vqav2(task: str, predictions: Source, annotations: Source, questions: Source | None, s: Settings) -> Score:
    """Score VQAv2 answers, overall and by answer type.

    Args:
        task: Name for messages and for the result.
        predictions: VQA results.
        annotations: VQA annotations.
        questions: VQA questions, checked against the annotations where given.
        s: Settings.

    Returns:
        The design's score object.

    Raises:
        InputError: See `mmkit.eval.scorers.formats`.
    """
    # The official repository's HEAD is the default; which version the evaluation server runs is not public.
    name = s.choice("rule", RULES, "official")
    known = formats.read_vqa(annotations, questions)
    rule = RULES[name]
    return score_answers(task, predictions, known, s, name, lambda text, q: vqa_accuracy(text, q.answers, rule))


SUITE = Suite("vqav2", examples, score_vqav2, question_rows, options=("rule",))
