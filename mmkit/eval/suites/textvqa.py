"""TextVQA (Singh et al. 2019): questions about text in the picture, by the M4C evaluator."""

from __future__ import annotations

from pathlib import Path

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.examples import Example, fill_prompt, picture_file, required
from mmkit.eval.result import Score, Settings, refuse_questions
from mmkit.eval.scorers import formats
from mmkit.eval.scorers.formats import Source
from mmkit.eval.scorers.textvqa import textvqa_accuracy
from mmkit.eval.suites.answers import score_answers
from mmkit.eval.suites.suite import Suite, question_rows
from mmkit.files import read_json


def examples(config: TaskConfig) -> list[Example]:
    """An example for each question, with or without the reference OCR tokens in the prompt.

    Args:
        config: ``annotations`` hold the questions; ``ocr`` says whether their OCR tokens are shown.

    Returns:
        Examples in the order of the annotations.

    Raises:
        InputError: Broken files, no OCR tokens where they are asked for, or a picture's name that cannot be made.
    """
    known = formats.read_textvqa(required(config, "annotations"))
    found = []
    for row in read_json(Path(str(config.annotations)))["data"]:
        i, question = row["question_id"], row["question"]
        if config.ocr == "reference":
            if "ocr_tokens" not in row:
                # Refused, not left out: the score's conditions would claim OCR tokens that the model never saw.
                what = f"question {i} has no ocr_tokens"
                raise InputError(what, where=config.annotations, mend="use ocr=none, or the 0.5.1 files with OCR")
            # On a line of their own after the question, as in LLaVA's file llava_textvqa_val_v051_ocr.jsonl.
            question = f"{question}\nReference OCR token: {', '.join(row['ocr_tokens'])}"
        # Open Images ids are text, which a number pattern would refuse.
        image = picture_file(config, row["image_id"], None, "{}.jpg")
        answers = [answer["answer"] for answer in known[i].answers]
        found.append(Example(i, (image,), fill_prompt(config, question=question), row["question"], answers))
    return found


def score_textvqa(task: str, predictions: Source, annotations: Source, questions: Source | None, s: Settings) -> Score:
    """Score TextVQA answers by the M4C rule.

    Args:
        task: Name for messages and for the result.
        predictions: ``[{"question_id", "answer"}]``.
        annotations: TextVQA annotations; they hold the questions.
        questions: Must be None.
        s: Settings.

    Returns:
        The design's score object.

    Raises:
        InputError: See `mmkit.eval.scorers.formats`.
    """
    # mmf, LLaVA and lmms-eval share one TextVQA evaluator, so there is no rule to choose.
    refuse_questions(questions, task)
    # Ids and answers are checked by the readers; from here on nothing can be malformed.
    known = formats.read_textvqa(annotations)
    return score_answers(
        task, predictions, known, s, "m4c", lambda text, q: textvqa_accuracy(text, [a["answer"] for a in q.answers])
    )


SUITE = Suite("textvqa", examples, score_textvqa, question_rows)
