"""TextVQA (Singh et al. 2019): questions about text in the picture, by the M4C evaluator.

Scores with and without the data set's OCR tokens in the prompt are scores of two tasks (LLaVA-1.5 7B: 58.2 and about 46), so
every score says which it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.examples import Example, fill_prompt, picture_file, required
from mmkit.eval.result import Score, Settings, refuse_questions
from mmkit.eval.scorers import formats
from mmkit.eval.scorers.anls import anls
from mmkit.eval.scorers.json_files import Source
from mmkit.eval.scorers.textvqa import is_llava, read_llava, textvqa_accuracy
from mmkit.eval.scorers.vqa import RULE_SOURCES
from mmkit.eval.suites.answers import score_answers
from mmkit.eval.suites.suite import Predictions, Suite, question_rows
from mmkit.files import read_json, write_json

# A result file does not say how its prompts were made; whoever scores it may.
OCR = ("unknown", "none", "reference")


def examples(config: TaskConfig) -> list[Example]:
    """An example for each question, with or without the reference OCR tokens in the prompt.

    Args:
        config: ``annotations`` hold the questions (``questions`` the file of a test set, whose answers the server keeps);
            ``ocr`` says whether their OCR tokens are shown.

    Returns:
        Examples in the order of the file.

    Raises:
        InputError: Broken files, no OCR tokens where they are asked for, or a picture's name that cannot be made.
    """
    if config.annotations is not None and config.questions is not None:
        refuse_questions(config.questions, config.task)
    file = config.annotations or required(config, "questions")
    known = formats.read_textvqa(file, answers=config.annotations is not None)
    found = []
    for row in read_json(Path(file))["data"]:
        i, question = row["question_id"], row["question"]
        if config.ocr == "reference":
            tokens = row.get("ocr_tokens")
            if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
                # Refused, not left out: the score's conditions would claim OCR tokens that the model never saw.
                what = f"question {i} has no ocr_tokens"
                raise InputError(what, where=file, mend="use ocr=none, or the 0.5.1 files with OCR")
            # On a line of their own after the question, as in LLaVA's file llava_textvqa_val_v051_ocr.jsonl.
            question = f"{question}\nReference OCR token: {', '.join(tokens)}"
        # Open Images ids are text, which a number pattern would refuse.
        image = picture_file(config, row["image_id"], None, "{}.jpg")
        answers = [answer["answer"] for answer in known[i].answers]
        found.append(Example(i, (image,), fill_prompt(config, question=question), row["question"], answers))
    return found


def score_textvqa(task: str, predictions: Source, annotations: Source, questions: Source | None, s: Settings) -> Score:
    """Score TextVQA answers by the M4C rule.

    The question's id pairs answers and questions; of LLaVA's files, whose id is the picture's, picture and question do.

    Args:
        task: Name for messages and for the result.
        predictions: ``[{"question_id", "answer"}]``, or LLaVA's answers (`mmkit.eval.scorers.textvqa.read_llava`).
        annotations: TextVQA annotations; they hold the questions.
        questions: Must be None.
        s: Settings; ``ocr`` says whether the prompts had the reference OCR tokens, ``anls=true`` adds that metric.

    Returns:
        The design's score object.

    Raises:
        InputError: See `mmkit.eval.scorers.formats`.
    """
    # mmf, LLaVA and lmms-eval share one TextVQA evaluator, so there is no rule to choose.
    refuse_questions(questions, task)
    ocr = s.choice("ocr", OCR, "unknown")
    wants_anls = s.choice("anls", ("true", "false"), "false", any_case=True) == "true"
    # Ids and answers are checked by the readers; from here on nothing can be malformed.
    known = formats.read_textvqa(annotations)
    data, name = formats.load_rows(predictions)
    if is_llava(data):
        results, shown = read_llava(data, name, known)
        # The prompts are at hand here, and what they show is no matter of belief.
        if ocr not in {"unknown", shown}:
            what = f"ocr={ocr}, but the prompts in the file of answers show {shown}"
            raise InputError(what, where=name, mend=f"leave ocr out, or ocr={shown}")
        ocr = shown
    else:
        results = formats.check_results(data, name, key="question_id", text="answer")
    return score_answers(
        task,
        results,
        name,
        known,
        s,
        lambda text, q: textvqa_accuracy(text, [a["answer"] for a in q.answers]),
        settings={"rule": "m4c", "evaluator": RULE_SOURCES["m4c"], "ocr": ocr},
        beside={"anls": lambda text, q: anls(text, [a["answer"] for a in q.answers])} if wants_anls else None,
    )


def submit(folder: Path, asked: Sequence[Example], predictions: Predictions) -> Path:
    """Write what EvalAI's TextVQA challenge takes: ``[{"question_id", "answer"}]``, answers as they are.

    Args:
        folder: Where to write.
        asked: The questions that were asked.
        predictions: Answer of each, by id.

    Returns:
        The file.
    """
    path = folder / "textvqa_submission.json"
    # Unprocessed: that server runs the M4C processing itself.
    write_json(path, question_rows(asked, predictions))
    return path


SUITE = Suite("textvqa", examples, score_textvqa, question_rows, options=("ocr", "anls"), submit=submit)
