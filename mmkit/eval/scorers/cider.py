"""CIDEr-D (Vedantam et al. 2015, section 5 and appendix), with the constants of pycocoevalcap 1.2 ``cider_scorer.py``.

What papers print as CIDEr on COCO is this: counts clipped, a Gaussian on the length difference, no stemming, document
frequencies taken from the references of the images being scored. So the score of an image depends on the set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmkit.eval.scorers.ngrams import MAX_N, Grams, NgramTable, ngram_table

# Of the Gaussian on the length difference, in bigrams as the lengths are.
SIGMA = 6.0


def cider_d(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of every image of a set.

    Args:
        hypotheses: One tokenised caption for each image.
        references: For each image at least one tokenised reference.

    Returns:
        One score for each image, in [0, 10]; the corpus score is their mean. With one image all are 0, because no
        n-gram then tells images apart.
    """
    scores: list[float] = cider_table(ngram_table(hypotheses, references)).tolist()
    return scores


def cider_table(table: NgramTable) -> NDArray[np.float64]:
    """CIDEr-D of every image, from the n-grams of the set.

    ``10 / 4 * sum_n mean_r [sum_g min(w_h(g), w_r(g)) w_r(g)] / (|w_h| |w_r|) * exp(-(L_h - L_r)^2 / (2 * 6^2))`` with
    ``w(g) = count(g) * (ln N - ln max(1, df(g)))``, df the number of images whose references have g, L in bigrams.

    Args:
        table: The set's n-grams.

    Returns:
        f64[N], in [0, 10].
    """
    images = len(table.hyp_length)
    if not images:
        return np.zeros(0)
    similarity = sum((_similarity(grams, table, images) for grams in table.grams), np.zeros(len(table.ref_image)))
    # The official code takes the number of bigrams, not of words, for the length.
    mine, theirs = np.maximum(0, table.hyp_length - 1), np.maximum(0, table.ref_length - 1)
    similarity *= np.exp(-((mine[table.ref_image] - theirs) ** 2) / (2 * SIGMA**2))
    # 10 is the scale of the paper's formula; result tables print another 100 times this.
    return 10.0 / MAX_N * np.bincount(table.ref_image, similarity, images) / np.bincount(table.ref_image, minlength=images)


def _similarity(grams: Grams, table: NgramTable, images: int) -> NDArray[np.float64]:
    """f64[M]: the clipped cosine of each reference and its image's hypothesis, for n-grams of one length."""
    # df counts images, however often their references repeat the gram.
    present = np.sort(table.ref_image[grams.ref_caption] * grams.kinds + grams.ref_gram)
    # Not np.unique, whose hash table takes twenty times as long on numbers like these.
    present = present[np.diff(present, prepend=-1) > 0] % grams.kinds
    # A gram that no reference has weighs as much as one in a single image, not infinitely much.
    idf = math.log(images) - np.log(np.maximum(1, np.bincount(present, minlength=grams.kinds)))
    mine, theirs = grams.hyp_count * idf[grams.hyp_gram], grams.ref_count * idf[grams.ref_gram]
    captions = len(table.ref_image)
    norms = np.sqrt(np.bincount(grams.ref_caption, theirs**2, captions))
    norms *= np.sqrt(np.bincount(grams.hyp_image, mine**2, images))[table.ref_image]
    said = grams.match >= 0
    # Clipping is the D of CIDEr-D: saying a rare word twice gains nothing.
    product = np.minimum(mine[grams.match[said]], theirs[said]) * theirs[said]
    dot = np.bincount(grams.ref_caption[said], product, captions)
    # Where a norm is 0 the official code leaves the product undivided; it is 0 then anyway.
    return np.divide(dot, norms, out=np.zeros(captions), where=norms > 0)
