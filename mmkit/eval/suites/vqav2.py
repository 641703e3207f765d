"""VQA v2 (GT-Vision-Lab/VQA): open answers against ten human ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.examples import Example, fill_prompt, picture_file, required
from mmkit.eval.result import Score, Settings
from mmkit.eval.scorers import formats
from mmkit.eval.scorers.json_files import Source, listed
from mmkit.eval.scorers.normalise import normalise_m4c
from mmkit.eval.scorers.vqa import RULE_SOURCES, RULES, vqa_accuracy
from mmkit.eval.suites.answers import score_answers
from mmkit.eval.suites.suite import Predictions, Suite, question_rows
from mmkit.files import write_json


def examples(config: TaskConfig) -> list[Example]:
    """An example for each question.

    Args:
        config: Both ``annotations`` and ``questions``, since VQA v2 keeps the texts of the questions apart; a test set has
            ``questions`` alone.

    Returns:
        Examples in the order of the annotations, without references for a test set.

    Raises:
        InputError: Broken files, files of different splits, ``settings.all_questions`` of which the questions are no part, or a
            picture's name that cannot be made.
    """
    questions = required(config, "questions")
    known = (
        formats.read_vqa_questions(questions) if config.annotations is None else formats.read_vqa(config.annotations, questions)
    )
    whole = config.settings.get("all_questions")
    if config.annotations is None and whole is not None:
        # Hours of answers later the submission would be refused.
        _whole_set(known, str(whole))
    # The readers have compared ids and pictures of the two files.
    return [
        Example(
            i,
            (picture_file(config, q.image_id, None, "{:012d}.jpg"),),
            fill_prompt(config, question=q.question),
            q.question,
            [answer["answer"] for answer in q.answers],
            q.answer_type,
        )
        for i, q in known.items()
    ]


def score_vqav2(task: str, predictions: Source, annotations: Source, questions: Source | None, s: Settings) -> Score:
    """Score VQAv2 answers: overall, by answer type, and by question type in ``breakdown``.

    Args:
        task: Name for messages and for the result.
        predictions: VQA results, or LLaVA's answers (JSON lines of ``question_id`` and ``text``).
        annotations: VQA annotations.
        questions: VQA questions, checked against the annotations where given.
        s: Settings; ``rule`` is a key of `RULES`.

    Returns:
        The design's score object.

    Raises:
        InputError: See `mmkit.eval.scorers.formats`.
    """
    # The official repository's HEAD is the default; which version the evaluation server runs is not public.
    name = s.choice("rule", RULES, "official")
    known = formats.read_vqa(annotations, questions)
    results, file = formats.read_results(predictions, key="question_id", text="answer", llava=("question_id", "text"))
    rule = RULES[name]
    return score_answers(
        task,
        results,
        file,
        known,
        s,
        lambda text, q: vqa_accuracy(text, q.answers, rule),
        settings={"rule": name, "evaluator": RULE_SOURCES[name]},
        breakdowns={"question_type": lambda q: q.question_type},
    )


def submit(folder: Path, asked: Sequence[Example], predictions: Predictions, *, all_questions: Source | None = None) -> Path:
    """Write what EvalAI's VQA challenge takes, as LLaVA's convert_vqav2_for_submission does.

    Args:
        folder: Where to write.
        asked: The questions that were asked, such as those of test-dev.
        predictions: Answer of each, by id.
        all_questions: Question file of the whole test set (test2015). The server wants a row for each of its questions; those
            that were not asked get an empty answer, so that only the phase of the asked ones means anything.

    Returns:
        The file: ``[{"question_id", "answer"}]``, answers in the M4C form, because the server may not process them.

    Raises:
        InputError: A question was asked that the whole set does not have.
    """
    answers = {e.id: normalise_m4c(predictions[e.id]) for e in asked}
    # In the order of the whole file, as LLaVA writes it; the server pairs by id.
    ids = list(answers) if all_questions is None else _whole_set(answers, all_questions)
    path = folder / "vqav2_submission.json"
    write_json(path, [{"question_id": i, "answer": answers.get(i, "")} for i in ids])
    return path


def _whole_set(asked: Mapping[Any, Any], all_questions: Source) -> list[int | str]:
    """Ids of the whole test set.

    Raises:
        InputError: Some of the asked questions are not in it.
    """
    ids = list(formats.read_vqa_questions(all_questions))
    # A file of another year or split, which only the server would notice.
    unknown = asked.keys() - set(ids)
    if unknown:
        what = f"{len(unknown)} questions were asked that are not in all_questions: {listed(sorted(unknown))}"
        mend = "give v2_OpenEnded_mscoco_test2015_questions.json, of which test-dev is a part"
        raise InputError(what, where="all_questions", mend=mend)
    return [*ids]


SUITE = Suite("vqav2", examples, score_vqav2, question_rows, options=("rule",), submit=submit, submit_options=("all_questions",))
