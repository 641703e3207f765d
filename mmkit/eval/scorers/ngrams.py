"""n-grams of a whole set of captions as sorted arrays of numbers, counted once for BLEU and CIDEr-D.

Counting tuples of words caption by caption is what makes the official scorers slow. Here words become numbers, an n-gram is
the number of its first n - 1 words with its last word, and all counting is sorting.
"""

from __future__ import annotations

import itertools
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_N = 4
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Grams:
    """All n-grams of one length: H different ones of the hypotheses, R of the references (counted for each caption).

    Attributes:
        kinds: Number of different n-grams; a gram is a number below it.
        hyp_image: i64[H], ascending.
        hyp_gram: i64[H].
        hyp_count: i64[H], how often the hypothesis of that image says it.
        ref_caption: i64[R], ascending.
        ref_gram: i64[R].
        ref_count: i64[R].
        match: i64[R], the hypothesis' entry for the same image and gram, or -1 where it does not say it.
    """

    kinds: int
    hyp_image: Ints
    hyp_gram: Ints
    hyp_count: Ints
    ref_caption: Ints
    ref_gram: Ints
    ref_count: Ints
    match: Ints


@dataclass(frozen=True)
class NgramTable:
    """N hypotheses and M references of N images.

    Attributes:
        hyp_length: i64[N], words.
        ref_length: i64[M], words.
        ref_image: i64[M], ascending.
        first: i64[N], each image's first reference.
        grams: One for each n = 1..4.
    """

    hyp_length: Ints
    ref_length: Ints
    ref_image: Ints
    first: Ints
    grams: list[Grams]


def ngram_table(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> NgramTable:
    """Count the n-grams of a set.

    Args:
        hypotheses: N tokenised captions; split at any white space, as the official BLEU and CIDEr do.
        references: For each image at least one tokenised reference.

    Returns:
        The table; about 60 bytes a word and n.
    """
    count = len(hypotheses)
    per_image = np.fromiter(map(len, references), np.int64, count)
    # Words are numbered as they appear: a word that is new gets the size of the table. All in C but for the new ones.
    numbers: defaultdict[str, int] = defaultdict()
    numbers.default_factory = numbers.__len__
    flat, sizes = array("q"), array("q")
    for text in itertools.chain(hypotheses, *references):
        split = text.split()
        sizes.append(len(split))
        flat.extend(map(numbers.__getitem__, split))
    words, lengths = np.frombuffer(flat, np.int64), np.frombuffer(sizes, np.int64)
    caption = np.repeat(np.arange(len(lengths)), lengths)
    ref_image = np.repeat(np.arange(count), per_image)
    grams, start, ids = [], np.arange(len(words)), words
    for n in range(1, MAX_N + 1):
        if n > 1:
            # An n-gram starts where an (n - 1)-gram does and has one more word of the same caption.
            inside = start + n - 1 < len(words)
            start, ids = start[inside], ids[inside]
            inside = caption[start] == caption[start + n - 1]
            start, ids = start[inside], ids[inside]
            # Numbered anew, so that the product below stays within 64 bits at every n.
            _, ids = np.unique(ids * len(numbers) + words[start + n - 1], return_inverse=True)
        grams.append(_count(caption[start], ids, count, ref_image))
    return NgramTable(lengths[:count], lengths[count:], ref_image, np.cumsum(per_image) - per_image, grams)


def _count(caption: Ints, ids: Ints, images: int, ref_image: Ints) -> Grams:
    """Count each caption's grams and find the hypothesis' entry for those of the references.

    Args:
        caption: i64[K], ascending; the hypotheses are captions 0 to ``images - 1``.
        ids: i64[K], the gram at each place.
        images: N.
        ref_image: i64[M].
    """
    kinds = int(ids.max()) + 1 if len(ids) else 1
    keys, counts = np.unique(caption * kinds + ids, return_counts=True)
    # Captions ascend in the keys, so the hypotheses' entries come first.
    cut = int(np.searchsorted(keys, images * kinds))
    hyp_keys, hyp_count, ref_count = keys[:cut], counts[:cut], counts[cut:]
    ref_caption, ref_gram = np.divmod(keys[cut:] - images * kinds, kinds)
    match = np.full(len(ref_caption), -1, dtype=np.int64)
    if cut:
        wanted = ref_image[ref_caption] * kinds + ref_gram
        place = np.minimum(np.searchsorted(hyp_keys, wanted), cut - 1)
        match = np.where(hyp_keys[place] == wanted, place, -1)
    hyp_image, hyp_gram = np.divmod(hyp_keys, kinds)
    return Grams(kinds, hyp_image, hyp_gram, hyp_count, ref_caption, ref_gram, ref_count, match)
