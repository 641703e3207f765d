"""VQA accuracy: ten human answers, each left out once (Antol et al. 2015; GT-Vision-Lab/VQA ``vqaEval.py``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmkit.eval.scorers.normalise import clean, normalise_lmms, normalise_m4c, normalise_vqa, process_punctuation

Rule = Callable[[str, Sequence[str]], tuple[str, list[str]]]


def rule_2021(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    """The official rule since 2021-03-11: nothing is processed, not even letter case, where all answers agree.

    Args:
        prediction: The model's answer.
        answers: The human answers.

    Returns:
        Prediction and answers as they are compared.
    """
    # Stripped before the test: ten answers that differ in a final space do agree.
    cleaned = {answer: clean(answer) for answer in set(answers)}
    # Meant to spare answers read off signs; "Yes" against ten "yes" scores 0 because of it.
    if len(set(cleaned.values())) == 1:
        return clean(prediction), [cleaned[answer] for answer in answers]
    # Cleaning again inside changes nothing, and raw answers are found in the cache.
    return normalise_vqa(prediction), [normalise_vqa(answer) for answer in answers]


def rule_2017(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    """The official rule until 2021: the prediction always in full, the answers' punctuation unless they agree.

    Args:
        prediction: The model's answer.
        answers: The human answers.

    Returns:
        Prediction and answers as they are compared.
    """
    # Unlike since 2021, human answers keep their capitals, articles and number words, and the test is on raw text.
    agreed = len(set(answers)) == 1
    return normalise_vqa(prediction), [answer if agreed else process_punctuation(answer) for answer in answers]


def rule_always(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    """lmms-eval's rule since 2025-08 (pull request 794): everything is processed in full, always.

    Args:
        prediction: The model's answer.
        answers: The human answers.

    Returns:
        Prediction and answers as they are compared.
    """
    # Older versions give other numbers: until 2025-07 they processed the prediction twice.
    return normalise_lmms(prediction), [normalise_lmms(answer) for answer in answers]


def rule_m4c(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    """The TextVQA rule (M4C evaluator in mmf, LLaVA and lmms-eval): M4C processing on both sides, always.

    Args:
        prediction: The model's answer.
        answers: The human answers.

    Returns:
        Prediction and answers as they are compared.
    """
    return normalise_m4c(prediction), [normalise_m4c(answer) for answer in answers]


RULES: dict[str, Rule] = {"official": rule_2021, "2017": rule_2017, "always": rule_always}
# Goes into every score: on the same 60 cases the rules give between 79.7 and 97.7.
RULE_SOURCES = {
    "official": "GT-Vision-Lab/VQA a013f00 (2021-03-11)",
    "2017": "GT-Vision-Lab/VQA a4f1afd (before 2021-03-11)",
    "always": "lmms-eval 0.7.2 vqav2_val",
    "m4c": "facebookresearch/mmf m4c_evaluators.py",
    "vizwiz": "VizWiz API vqaEval.py (Qing Li)",
}


def leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the answers of ``min(1, matches among the others / 3)``.

    Args:
        prediction: Processed prediction.
        answers: Processed human answers; each counts as itself, equal ones included.

    Returns:
        0, 0.3, 0.6, 0.9 or 1 with ten answers.
    """
    # Upstream's double loop over the answers in closed form; a test holds it against the loop.
    matches = answers.count(prediction)
    others = len(answers) - matches
    # An answer that matches is not among its own others, hence matches - 1 for those.
    return (matches * min(1.0, (matches - 1) / 3) + others * min(1.0, matches / 3)) / len(answers)


def _leave_equal_out(prediction: str, answers: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> float:
    """The official code's literal test: "other" entries are those that differ as dictionaries."""
    # Upstream writes the processed answer back into the entry before it compares entries.
    processed = [{**entry, "answer": answer} for entry, answer in zip(entries, answers, strict=True)]
    # Copies above: upstream changes its annotations, so that a second evaluation there starts from processed answers.
    total = 0.0
    for entry in processed:
        matches = sum(other["answer"] == prediction for other in processed if other != entry)
        total += min(1.0, matches / 3)
    return total / len(processed)


def vqa_accuracy(prediction: str, entries: Sequence[Mapping[str, Any]], rule: Rule) -> float:
    """Accuracy of one VQAv2 answer.

    Args:
        prediction: The model's answer, raw.
        entries: The annotation's ``answers``: dictionaries with ``answer`` and, in official files, ``answer_id``.
        rule: One of `RULES`.

    Returns:
        A fraction in [0, 1].
    """
    processed, answers = rule(prediction, [entry["answer"] for entry in entries])
    # Distinct ids make all entries differ, so leaving out by position and by equality are the same.
    ids = {entry.get("answer_id") for entry in entries}
    if len(ids) == len(entries):
        return leave_one_out(processed, answers)
    # Without distinct answer ids equal answers are one and the same to the official code, and lose their votes.
    return _leave_equal_out(processed, answers, entries)
