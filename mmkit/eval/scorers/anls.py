"""Average normalised Levenshtein similarity (Biten et al. 2019, section 4.1), for answers that are read off a picture."""

from __future__ import annotations

from collections.abc import Sequence

# Below half of the characters right it is another word, not a misread one.
THRESHOLD = 0.5


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: fewest insertions, deletions and replacements of characters that turn ``a`` into ``b``."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        # One row of the table at a time; diagonal is the entry of the row before, one to the left.
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Best similarity to one of the answers, as mmf's STVQAANLSEvaluator has it.

    Args:
        prediction: The model's answer, raw.
        answers: True answers, raw; both sides are lower-cased and stripped.

    Returns:
        1 - distance / length of the longer text, or 0 where that is below one half.
    """
    text = prediction.lower().strip()
    return max((_similarity(text, answer) for answer in {answer.lower().strip() for answer in answers}), default=0.0)


def _similarity(a: str, b: str) -> float:
    """Of one pair."""
    longer = max(len(a), len(b))
    if a == b:
        return 1.0
    # The lengths alone say that more than half is wrong: a sentence against a word costs nothing.
    if abs(len(a) - len(b)) > THRESHOLD * longer:
        return 0.0
    value = 1 - edit_distance(a, b) / longer
    return value if value >= THRESHOLD else 0.0
