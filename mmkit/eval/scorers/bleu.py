"""Corpus BLEU-1..4 as in coco-caption, by way of additive statistics of each image.

Formula: Papineni et al. 2002, sections 2.1-2.3, with the constants of pycocoevalcap 1.2 ``bleu/bleu_scorer.py``;
written anew, since that file's header forbids redistribution.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mmkit.eval.scorers.ngrams import MAX_N, NgramTable

# Columns of one image's statistics: hypothesis length, closest reference length, guessed n-grams, correct n-grams.
COLUMNS = 2 + 2 * MAX_N
# pycocoevalcap's only smoothing: a sum of zero still gives a number, and it shows in published per-image values.
TINY, SMALL = 1e-15, 1e-9

Ngram = tuple[str, ...]


def ngram_counts(words: Sequence[str], max_n: int = MAX_N) -> Counter[Ngram]:
    """Count all n-grams of a sentence for n = 1..max_n.

    Args:
        words: The sentence, split.
        max_n: Longest n-gram.

    Returns:
        n-gram (a tuple of words) -> number of times it occurs.
    """
    return Counter(tuple(words[i : i + n]) for n in range(1, max_n + 1) for i in range(len(words) - n + 1))


def bleu_statistics(hypothesis: str, references: Sequence[str]) -> NDArray[np.int64]:
    """Count what one image adds to corpus BLEU.

    Args:
        hypothesis: Tokenised caption; split at any white space, as the official code does.
        references: At least one tokenised reference.

    Returns:
        i64[10]: hypothesis length, closest reference length (the shorter on a tie), guess_1..4, correct_1..4.
    """
    # Any white space, so the no-break space inside "22 3/4" separates words here; for ROUGE-L it does not.
    words = hypothesis.split()
    # All four lengths in one Counter: the n-gram's own length tells which column it belongs to.
    counts = ngram_counts(words)
    ceiling: Counter[Ngram] = Counter()
    lengths = []
    for reference in references:
        reference_words = reference.split()
        lengths.append(len(reference_words))
        ceiling |= ngram_counts(reference_words)  # the union of Counters is the maximum of the counts
    closest = min(lengths, key=lambda length: (abs(length - len(words)), length))
    correct = [0] * MAX_N
    for ngram, count in counts.items():
        # Clipped: a repeated word counts as often as one reference has it, not as often as it is said.
        correct[len(ngram) - 1] += min(count, ceiling[ngram])
    # Without the floor a caption shorter than n words would take guesses away from the other images.
    guess = [max(0, len(words) - n) for n in range(MAX_N)]
    return np.array([len(words), closest, *guess, *correct], dtype=np.int64)


def bleu_table(table: NgramTable) -> NDArray[np.int64]:
    """What `bleu_statistics` gives for each image, for a whole set at once.

    Args:
        table: The set's n-grams.

    Returns:
        i64[N, 10].
    """
    images = len(table.hyp_length)
    out = np.zeros((images, COLUMNS), dtype=np.int64)
    out[:, 0] = table.hyp_length
    if not images:
        return out
    # The shorter on a tie: distance first, length second, in one number that minimum can compare.
    scale = int(table.ref_length.max()) + 1
    distance = np.abs(table.ref_length - table.hyp_length[table.ref_image])
    out[:, 1] = np.minimum.reduceat(distance * scale + table.ref_length, table.first) % scale
    for index, grams in enumerate(table.grams):
        said = grams.match >= 0
        ceiling = np.zeros(len(grams.hyp_count), dtype=np.int64)
        np.maximum.at(ceiling, grams.match[said], grams.ref_count[said])
        correct = np.minimum(grams.hyp_count, ceiling)
        out[:, 2 + index] = np.maximum(0, table.hyp_length - index)
        # Weights make bincount add floats; counts of words are far below the 2^53 to which those are exact.
        out[:, 2 + MAX_N + index] = np.bincount(grams.hyp_image, weights=correct, minlength=images)
    return out


def bleu_from_statistics(statistics: NDArray[np.integer] | NDArray[np.floating]) -> NDArray[np.float64]:
    """Compute BLEU-1..4 from statistics summed over any set of images.

    ``p_n = (correct_n + 1e-15) / (guess_n + 1e-9)``; BLEU_k is the geometric mean of p_1..p_k, times
    ``exp(1 - 1 / ratio)`` where ``ratio = (hypothesis + 1e-15) / (reference + 1e-9)`` is below 1.

    Args:
        statistics: [..., 10] as from `bleu_statistics`, one image or sums.

    Returns:
        f64[..., 4], fractions.
    """
    values = np.asarray(statistics, dtype=np.float64)
    guess, correct = values[..., 2 : 2 + MAX_N], values[..., 2 + MAX_N :]
    # TINY keeps a corpus without one match above 0; SMALL keeps a guess of 0 from dividing by zero.
    precision = (correct + TINY) / (guess + SMALL)
    bleu = np.cumprod(precision, axis=-1) ** (1.0 / np.arange(1, MAX_N + 1))
    # TINY above and SMALL below, as upstream: at equal lengths the ratio is a hair below 1, and so is the penalty.
    ratio = (values[..., 0] + TINY) / (values[..., 1] + SMALL)
    # minimum(): the branch that is not taken must not overflow.
    brevity = np.where(ratio < 1, np.exp(np.minimum(0.0, 1 - 1 / ratio)), 1.0)
    return bleu * brevity[..., None]


def bleu_counters(statistics: NDArray[np.integer]) -> Mapping[str, object]:
    """Name the summed counters the way the official notebook prints them.

    Args:
        statistics: i64[10] summed over images.

    Returns:
        ``test_length``, ``reference_length``, ``guess``, ``correct`` and ``ratio``.
    """
    total = [int(value) for value in statistics]
    return {
        "test_length": total[0],
        "reference_length": total[1],
        "guess": total[2 : 2 + MAX_N],
        "correct": total[2 + MAX_N :],
        "ratio": (total[0] + TINY) / (total[1] + SMALL),
    }
