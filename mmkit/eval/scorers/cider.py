"""CIDEr-D (Vedantam et al. 2015, section 5 and appendix), with the constants of pycocoevalcap 1.2 ``cider_scorer.py``.

What papers print as CIDEr on COCO is this: counts clipped, a Gaussian on the length difference, no stemming, document
frequencies taken from the references of the images being scored. So the score of an image depends on the set.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmkit.eval.scorers.bleu import MAX_N, Ngram, ngram_counts

# Of the Gaussian on the length difference, in bigrams as `length` is.
SIGMA = 6.0


@dataclass(frozen=True)
class _Vector:
    """A sentence as tf-idf weights for each n, their norms, and its length in bigrams."""

    weights: list[dict[Ngram, float]]
    norms: list[float]
    length: int


def document_frequencies(references: Sequence[Sequence[str]]) -> Counter[Ngram]:
    """Count in how many images' reference sets each n-gram occurs.

    Args:
        references: For each image its tokenised references.

    Returns:
        n-gram -> number of images.
    """
    # A set for each image: df counts images, however often a reference repeats the n-gram.
    frequencies: Counter[Ngram] = Counter()
    for captions in references:
        frequencies.update({ngram for caption in captions for ngram in ngram_counts(caption.split())})
    return frequencies


def _vector(caption: str, frequencies: Mapping[Ngram, int], log_images: float) -> _Vector:
    """Weigh the n-grams of a caption by raw count times ``ln N - ln max(1, df)``."""
    words = caption.split()
    weights: list[dict[Ngram, float]] = [{} for _ in range(MAX_N)]
    for ngram, count in ngram_counts(words).items():
        # An n-gram that no reference has weighs as much as one in a single image, not infinitely much.
        idf = log_images - math.log(max(1, frequencies.get(ngram, 0)))
        # Raw counts, not shares of the caption: the cosine takes the length out again.
        weights[len(ngram) - 1][ngram] = count * idf
    norms = [math.sqrt(sum(weight * weight for weight in table.values())) for table in weights]
    # The official code takes the number of bigrams, not of words, for the length.
    return _Vector(weights, norms, max(0, len(words) - 1))


def _similarity(hypothesis: _Vector, reference: _Vector) -> float:
    """Sum over n of the clipped cosine, times the Gaussian of the length difference."""
    total = 0.0
    for mine, theirs, my_norm, their_norm in zip(
        hypothesis.weights, reference.weights, hypothesis.norms, reference.norms, strict=True
    ):
        # Clipping is the D of CIDEr-D: saying a rare word twice gains nothing.
        product = sum(min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in mine.items() if ngram in theirs)
        # The official code leaves a product undivided when a norm is 0; it is 0 then anyway.
        total += product / (my_norm * their_norm) if my_norm and their_norm else product
    delta = hypothesis.length - reference.length
    return total * math.exp(-(delta**2) / (2 * SIGMA**2))


def cider_d(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of every image of a set.

    Args:
        hypotheses: One tokenised caption for each image.
        references: For each image at least one tokenised reference.

    Returns:
        One score for each image, in [0, 10]; the corpus score is their mean. With one image all are 0, because no
        n-gram then tells images apart.
    """
    frequencies = document_frequencies(references)
    # max: an empty set has no images to take the logarithm of.
    log_images = math.log(max(1, len(references)))
    scores = []
    for hypothesis, captions in zip(hypotheses, references, strict=True):
        mine = _vector(hypothesis, frequencies, log_images)
        total = sum(_similarity(mine, _vector(caption, frequencies, log_images)) for caption in captions)
        # 10 is the scale of the paper's formula; result tables print another 100 times this.
        scores.append(10.0 * total / MAX_N / len(captions))
    return scores
