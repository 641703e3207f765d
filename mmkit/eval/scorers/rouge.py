"""ROUGE-L as in coco-caption (Lin 2004, section 3, with the beta of pycocoevalcap 1.2 ``rouge/rouge.py``)."""

from __future__ import annotations

from collections.abc import Sequence

# Above 1: recall weighs more than precision.
BETA = 1.2


def lcs_length(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence of two word lists.

    Bit-parallel (Hyyrö 2004): one big-integer addition for each word of ``right`` in place of a row of the table, so
    a caption of thousands of words costs milliseconds, not minutes.

    Args:
        left: Words.
        right: Words.

    Returns:
        The length.
    """
    return _common(word_bits(left), len(left), right)


def word_bits(words: Sequence[str]) -> dict[str, int]:
    """Word -> its places in a list, one bit each."""
    bits: dict[str, int] = {}
    for index, word in enumerate(words):
        bits[word] = bits.get(word, 0) | (1 << index)
    return bits


def _common(bits: dict[str, int], length: int, right: Sequence[str]) -> int:
    """`lcs_length` of a list of ``length`` words by their `word_bits`."""
    full = row = (1 << length) - 1
    for word in right:
        # A word that is not in the list leaves the row as it is, which is most of them.
        if word in bits:
            matched = row & bits[word]
            # A zero in the row stands for a step of the common subsequence.
            row = ((row + matched) | (row - matched)) & full
    return length - row.bit_count()


def rouge_l(hypothesis: str, references: Sequence[str]) -> float:
    """ROUGE-L of one image: the best precision and the best recall, each over all references.

    ``F = (1 + b^2) P R / (R + b^2 P)`` with b = 1.2, and 0 where P or R is 0.

    Args:
        hypothesis: Tokenised caption, split at single spaces: an empty caption is one empty word, so that empty
            against empty is 1, as the official code has it.
        references: At least one tokenised reference.

    Returns:
        A fraction in [0, 1].
    """
    # Not split(): a no-break space stays inside its word, as upstream; BLEU and CIDEr split there.
    words = hypothesis.split(" ")
    # Once for all references of the picture.
    bits, length = word_bits(words), len(words)
    # The two maxima may come from different references; that is the official code's way.
    precision = recall = 0.0
    for reference in references:
        reference_words = reference.split(" ")
        common = _common(bits, length, reference_words)
        precision = max(precision, common / length)
        recall = max(recall, common / len(reference_words))
    # Upstream's rule, and F would be 0 / 0.
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
