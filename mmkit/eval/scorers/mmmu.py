"""MMMU's parsing and judging (MMMU-Benchmark/MMMU, mmmu/utils/eval_utils.py, bb0b95a), without its random letter.

Where the official parser draws a letter at random, `parse_choice` says None; `mmkit.eval.suites.mmmu` draws beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Union

# Stripped from both ends one after the other, in this order: "'." at the end loses both, ".'" only the apostrophe's outside.
_MARKS = (",", ".", "!", "?", ";", ":", "'")
# Options are looked for by their text only in answers of more words than this.
_SHORT = 5
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
# Words before a result; "=" counts in the last part alone, where an equation may end.
_BEFORE_RESULT = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
# After lower-casing no capital is left, so the official pattern's sentence break never matches; lines are the parts.
_PARTS = re.compile(r"\n")
_TRIVIAL = frozenset(":,.!?;'")

Value = Union[str, float]


def parse_choice(response: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer to a multiple-choice question names.

    Args:
        response: The answer, as it is.
        options: Letter -> text.

    Returns:
        The letter that stands last, looked for as ``(A)``, then between spaces, then by the option's text; None where the
        official parser draws one at random.
    """
    for mark in _MARKS:
        response = response.strip(mark)
    response = f" {response} "
    # Brackets win over bare letters wherever they stand: "B, not (A)" is A.
    for shape in ("({})", " {} "):
        places = {letter: response.rfind(shape.format(letter)) for letter in options}
        if max(places.values()) >= 0:
            return _last(places)
    # The official length test; below it an option's text would be found in passing.
    if len(response.split()) <= _SHORT:
        return None
    lower = response.lower()
    places = {letter: lower.rfind(text.lower()) for letter, text in options.items()}
    return _last(places) if max(places.values()) >= 0 else None


def _last(places: Mapping[str, int]) -> str:
    """The letter of the last place, the first letter where two share it (as numpy's argmax)."""
    return max(places, key=lambda letter: places[letter])


def normalise_value(text: str) -> list[Value]:
    """A number rounded to two decimals, or the lower-cased text; one letter twice, with a space on either side.

    Args:
        text: An answer or a part of one.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    # So that a single letter is not found inside every word.
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def parse_open(response: str) -> list[Value]:
    """Candidates for the answer to an open question.

    Args:
        response: The answer, as it is.

    Returns:
        Texts and numbers without repeats, in the order they were found.
    """
    # The texts themselves stay candidates beside the numbers in them.
    parts = _key_parts(response)
    numbers = [number for part in parts for pattern in _NUMBERS for number in pattern.findall(part)]
    values = [value for text in [*parts, *numbers] for value in normalise_value(text)]
    return list(dict.fromkeys(values))


def _key_parts(response: str) -> list[str]:
    """What stands after the words that announce a result, a part a line; the whole answer where there is no such word."""
    response = response.strip().strip(".").lower()
    lines = _PARTS.split(response)
    found = []
    for index, line in enumerate(lines):
        words = (*_BEFORE_RESULT, "=") if index == len(lines) - 1 else _BEFORE_RESULT
        # What follows the last place of each word.
        tails = [line.split(word)[-1].strip() for word in words if word in line]
        key = _shortest(tails)
        if key and key not in _TRIVIAL:
            found.append(key)
    return found or [response]


def _shortest(tails: Sequence[str]) -> str | None:
    """The shortest tail; an empty one gives way to whatever comes after it, as in the official loop."""
    chosen: str | None = None
    for tail in tails:
        # "not chosen" is also true of an empty text.
        if not chosen or len(tail) < len(chosen):
            chosen = tail
    return chosen


def open_correct(gold: Union[str, Sequence[str]], candidates: Sequence[Value]) -> bool:
    """Whether a gold text is contained in a candidate, or a gold number equals one.

    Args:
        gold: The answer, or all accepted ones.
        candidates: From `parse_open`.
    """
    # Gold goes through the same normalising as the answer, so 12.970 equals 12.97.
    answers = [value for text in ([gold] if isinstance(gold, str) else gold) for value in normalise_value(text)]
    texts = [value for value in answers if isinstance(value, str)]
    return any(
        # A text contains the answer, a number equals it.
        any(text in value for text in texts) if isinstance(value, str) else value in answers
        for value in candidates
    )
