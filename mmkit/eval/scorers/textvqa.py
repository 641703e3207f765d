"""TextVQA accuracy (Singh et al. 2019) by the M4C evaluator that mmf, LLaVA and lmms-eval share, and LLaVA's answer files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmkit.errors import InputError
from mmkit.eval.scorers.formats import VqaQuestion, check_rows
from mmkit.eval.scorers.vqa import leave_one_out, rule_m4c

# Begins the line of OCR tokens in LLaVA's prompts, before or after the question.
OCR_LINE = "Reference OCR token:"


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy of one TextVQA answer: M4C processing on both sides, each human answer left out once.

    Args:
        prediction: The model's answer, raw.
        answers: The ten human answers, raw.

    Returns:
        0, 0.3, 0.6, 0.9 or 1.
    """
    # By position, not by equality as VQA's code has it: TextVQA's answers are bare texts, and equal ones keep their votes.
    return leave_one_out(*rule_m4c(prediction, answers))


def is_llava(data: object) -> bool:
    """Whether loaded answers are LLaVA's: rows with the prompt, whose id names the picture."""
    first = data[0] if isinstance(data, list) and data else None
    return isinstance(first, dict) and "prompt" in first and "text" in first and "answer" not in first


def read_llava(rows: Sequence[Any], name: str, known: Mapping[int, VqaQuestion]) -> tuple[dict[int, str], str]:
    """Pair LLaVA's answers with the questions, as its eval_textvqa.py (c121f04) does: by picture and question in small letters.

    Args:
        rows: ``question_id`` (the image's id), ``prompt`` and ``text``.
        name: The file, for messages.
        known: The questions.

    Returns:
        Question id -> answer; and ``reference`` where the prompts show OCR tokens, else ``none``.

    Raises:
        InputError: Fields missing or of the wrong type; a prompt that is not LLaVA's; a question that is unknown or answered
            twice; or OCR tokens in some prompts only.
    """
    check_rows(rows, {"question_id": str, "prompt": str, "text": str}, kind="row", key="question_id", name=name)
    places: dict[tuple[str, str], list[int]] = {}
    for key, question in known.items():
        # A picture may be asked the same thing twice, where LLaVA's own look-up scores both answers by the last.
        places.setdefault((str(question.image_id), question.question.strip().lower()), []).append(key)
    found: dict[int, str] = {}
    shown = set()
    for number, row in enumerate(rows, start=1):
        asked, ocr = _question(row["prompt"])
        shown.add("reference" if ocr else "none")
        keys = places.get((row["question_id"], asked.strip().lower()))
        where = f"{name}: row {number}"
        if not keys:
            what = f"picture {row['question_id']} is not asked {asked!r:.60}"
            raise InputError(what, where=where, mend="give the annotations the prompts were made from")
        free = [key for key in keys if key not in found]
        if not free:
            raise InputError(f"a second answer to question {keys[-1]}", where=where, mend="keep one for each question")
        found[free[0]] = row["text"]
    if len(shown) > 1:
        raise InputError("some prompts show OCR tokens and some do not", where=name, mend="score the two kinds apart")
    return found, shown.pop()


def _question(prompt: str) -> tuple[str, bool]:
    """The question of a prompt, and whether OCR tokens stand beside it; they may stand in the first line."""
    lines = prompt.split("\n")
    ocr = any(line.startswith(OCR_LINE) for line in lines)
    return lines[1 if lines[0].startswith(OCR_LINE) and len(lines) > 1 else 0], ocr
