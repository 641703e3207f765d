"""Which option of a multiple-choice question an answer names: ScienceQA's rules and MMBench's.

No rule guesses: what cannot be decided is None, counts as wrong, and is counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

# Options that ScienceQA's questions have at most.
LETTERS = "ABCDE"
# Any character after the letter, not a period alone: LLaVA's pattern leaves the period unescaped.
_THE_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")
# Marks that VLMEvalKit turns into spaces before it looks for letters.
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# Answers by which some services refuse; VLMEvalKit takes them for "none of the options".
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
# A letter counts only among the last words: "A" at the beginning of a sentence is an article.
_LAST_WORDS = 4


def llava_letter(text: str) -> str | None:
    """The letter by LLaVA's eval_science_qa.py (c121f04): alone, before ``". "``, or in one "The answer is X.".

    Args:
        text: The answer, as it is.

    Returns:
        A letter, which need not be one of the question's; None where LLaVA writes FAILED.
    """
    # A single character: `in` would find "BC" and "" in the letters, too.
    if len(text) == 1 and text in LETTERS:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = _THE_ANSWER_IS.findall(text)
    # Two such sentences may contradict each other.
    return found[0] if len(found) == 1 else None


def lmms_letter(text: str) -> str | None:
    """The letter by lmms-eval 0.7: alone in either case, or a capital before a period; white space around does not count.

    Args:
        text: The answer, as it is.

    Returns:
        A capital letter, which need not be one of the question's, or None.
    """
    # Unlike LLaVA, which reads " B" as no letter.
    text = text.strip()
    # Either case, where LLaVA wants a capital; but no sentence is searched for its answer.
    if len(text) == 1 and text.upper() in LETTERS:
        return text.upper()
    if len(text) >= 2 and text[0].isupper() and text[1] == ".":
        return text[0]
    return None


# Rules of `mmkit score scienceqa`, the first is the default.
SCIENCEQA_RULES: dict[str, Callable[[str], str | None]] = {"llava": llava_letter, "lmms": lmms_letter}


def infer_option(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer names by its letter or by its text, without asking a language model.

    This is VLMEvalKit's ``can_infer`` (vlmeval/utils/matching_util.py, 2026): exactly one option letter stands as a word of its
    own, among the last four words; or else the text of exactly one option occurs in an answer that is not much longer than the
    options.

    Args:
        answer: The answer, as it is.
        options: Letter -> text of the question's options.

    Returns:
        A letter of the options; None where there is none, several, or a refusal.
    """
    if any(refusal in answer for refusal in _REFUSALS):
        return None
    words = answer.translate(_MARKS).split()
    named = [letter for letter in options if letter in words]
    # The first of its places counts, though a later one may lie among the last words.
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS:
        return named[0]
    # VLMEvalKit's own sign for "none of the options".
    if not named and "Z" in words:
        return None
    return _option_text(answer, options)


def _option_text(answer: str, options: Mapping[str, str]) -> str | None:
    """The only option whose text occurs in the answer, ignoring case."""
    # A long answer mentions options that it does not choose.
    if len(answer) > 2 * sum(len(text) for text in options.values()):
        return None
    # Part of a word counts, as in the original: "reddish" names red.
    lower = answer.lower()
    found = [letter for letter, text in options.items() if text.lower() in lower]
    return found[0] if len(found) == 1 else None
