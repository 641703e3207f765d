"""Answer normalisation of the VQA and M4C (TextVQA) evaluators, quirks included.

Sources: GT-Vision-Lab/VQA ``vqaEval.py`` (``processPunctuation``, ``processDigitArticle``) and facebookresearch/mmf
``m4c_evaluators.py`` (``EvalAIAnswerProcessor``). The quirks are part of every published number, so they stay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

# Apostrophe, colon and $ % & * # ~ ^ | are not on upstream's list, and stay.
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_MARKS = frozenset(PUNCTUATION)
_ANY_MARK = re.compile(f"[{re.escape(PUNCTUATION)}.]")
ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# Upstream reads "none" as 0, and knows no number word beyond ten.
NUMBERS = {"none": "0", **{word: str(value) for value, word in enumerate(_NUMBER_WORDS)}}


class Digits(NamedTuple):
    """Where an evaluator sees digits beside a mark.

    Attributes:
        comma: A number with a comma, anywhere in an answer.
        period: A period that goes. Upstream means "no digit on either side", but its look-behind is mistyped and only the right
            side counts.
    """

    comma: re.Pattern[str]
    period: re.Pattern[str]


# GT-Vision-Lab's code is Python 2, where \d knows ASCII digits alone; the others' is Python 3, where it knows all scripts'.
DIGITS_VQA = Digits(re.compile(r"\d,\d", re.ASCII), re.compile(r"\.(?!\d)", re.ASCII))
DIGITS_VIZWIZ = Digits(re.compile(r"\d,\d"), re.compile(r"\.(?!\d)"))
# M4C's comma may be several, as in "1,,000"; lmms-eval runs this part of it without taking the commas out before.
DIGITS_M4C = Digits(re.compile(r"\d,+\d"), re.compile(r"\.(?!\d)"))
# Upstream passes re.UNICODE (32) where ``re.sub`` takes its count: at most 32 periods go.
_MAX_PERIODS = int(re.UNICODE)

# Stems of the contraction table. Entries that upstream lacks are not added, however regular they would be.
_NOT = "ai are ca could did does do had has have is might must need ought sha should was were wo would"
_NOT_HAVE = "could had might should would"
_HAVE = "could I might must not should they we what where who would you"
_WOULD_HAVE = "he I it she somebody someone something there they we who you"
_WOULD = "he how it someone something there they where who you"
_WILL = "how it somebody someone something they what who why you"
_IS = "he how somebody someone that there what when where who why"
_ARE = "there they what why you"
_SINGLE = {
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    # Never met, since texts are lower-cased first; kept because upstream's table has it ("Ive" likewise).
    "Im": "I'm",
    "maam": "ma'am",
    "oclock": "o'clock",
    "twas": "'twas",
    "yall": "y'all",
    "let's": "let's",
    "she's": "she's",
    # Upstream's slip: here the apostrophe is lost instead of restored.
    "somebody'd": "somebodyd",
}


def _contractions() -> dict[str, str]:
    """Build the evaluators' 120-entry table from its regular part and its single entries."""
    table = dict(_SINGLE)
    for stems, ending, full in (
        (_NOT, "nt", "n't"),
        (_HAVE, "ve", "'ve"),
        (_WOULD, "d", "'d"),
        (_WILL, "ll", "'ll"),
        (_IS, "s", "'s"),
        (_ARE, "re", "'re"),
    ):
        table.update({stem + ending: stem + full for stem in stems.split()})
    for stems, endings, full in (
        (_NOT_HAVE, ("nt've", "n'tve"), "n't've"),
        (_WOULD_HAVE, ("d've", "'dve"), "'d've"),
    ):
        table.update({stem + ending: stem + full for stem in stems.split() for ending in endings})
    return table


CONTRACTIONS = _contractions()


def word_table(contractions: Mapping[str, str]) -> dict[str, str]:
    """What becomes of single words: number words, articles (which become nothing) and contractions in one look-up."""
    # A word is in one of the three at most, and no replacement is a key of another: one look-up is as good as three in turn.
    return {**contractions, **NUMBERS, **dict.fromkeys(ARTICLES, "")}


_WORDS = word_table(CONTRACTIONS)


def clean(text: str) -> str:
    """Replace line feeds and tabs by spaces and strip the ends (the evaluators' first step)."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def process_punctuation(text: str, digits: Digits = DIGITS_VQA) -> str:
    """Remove the VQA punctuation marks, then periods.

    A mark is deleted where the original text has it beside a space or has digit-comma-digit anywhere, and becomes a
    space otherwise. Up to 32 periods that no digit follows are deleted.

    Args:
        text: An answer.
        digits: Which digits the evaluator sees.

    Returns:
        The answer without those marks; letter case untouched.
    """
    # Most answers are plain words: one scan saves twenty.
    if _ANY_MARK.search(text) is None:
        return text
    has_comma_number = digits.comma.search(text) is not None
    table = {}
    for mark in _MARKS.intersection(text):
        # Tested on the original text, whatever earlier marks have become in the result.
        beside_space = f"{mark} " in text or f" {mark}" in text
        # One number with a comma anywhere deletes every mark of the answer: "1,000 m/s" becomes "1000 ms".
        table[ord(mark)] = None if beside_space or has_comma_number else " "
    # All marks at once are as good as upstream's one after another: no mark becomes another mark.
    return digits.period.sub("", text.translate(table), count=_MAX_PERIODS)


def process_digits_and_articles(text: str, words: Mapping[str, str] = _WORDS) -> str:
    """Lower-case, map number words to digits, drop articles and restore apostrophes in contractions.

    Args:
        text: An answer.
        words: What becomes of a word, by `word_table`; one that becomes nothing is dropped.

    Returns:
        The words that stay, joined by single spaces.
    """
    # Lower-casing comes only here, after the punctuation, which does not depend on case.
    return " ".join([new for word in text.lower().split() if (new := words.get(word, word))])


# People give the same few thousand answers: of VQA v2's two million, nine of ten have been processed before.
@lru_cache(maxsize=1 << 16)
def normalise_vqa(text: str) -> str:
    """The full VQA processing: clean, punctuation, then digits, articles and contractions."""
    return process_digits_and_articles(process_punctuation(clean(text)))


@lru_cache(maxsize=1 << 16)
def normalise_lmms(text: str) -> str:
    """VQA's processing by lmms-eval, which has M4C's functions: it differs in digits of other scripts and in "1,,000"."""
    return process_digits_and_articles(process_punctuation(clean(text), DIGITS_M4C))


@lru_cache(maxsize=1 << 16)
def normalise_m4c(text: str) -> str:
    """The M4C processing of TextVQA: as VQA's, but commas and question marks go first and possessives are split.

    Args:
        text: An answer.

    Returns:
        The processed answer; LLaVA writes answers in this form into its VQAv2 submissions, too.
    """
    # Commas go before VQA's digit-comma-digit test, which then never fires: "1,000 m/s" becomes "1000 m s".
    lowered = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return process_digits_and_articles(process_punctuation(clean(lowered), DIGITS_M4C))
