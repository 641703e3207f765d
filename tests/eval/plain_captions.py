"""CIDEr-D and ROUGE-L word by word, as their definitions read: the twins of the fast ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from mmkit.eval.scorers.bleu import ngram_counts
from mmkit.eval.scorers.ngrams import MAX_N

Vector = tuple[list[dict[tuple[str, ...], float]], list[float], int]


def plain_vector(caption: str, frequencies: Counter[tuple[str, ...]], images: int) -> Vector:
    """Weights count x (ln N - ln max(1, df)) for each n, their norms, and the length in bigrams."""
    words = caption.split()
    weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(MAX_N)]
    for ngram, count in ngram_counts(words).items():
        weights[len(ngram) - 1][ngram] = count * (math.log(images) - math.log(max(1, frequencies[ngram])))
    return weights, [math.sqrt(sum(w * w for w in table.values())) for table in weights], max(0, len(words) - 1)


def plain_cider_d(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    frequencies: Counter[tuple[str, ...]] = Counter()
    for captions in references:
        frequencies.update({ngram for caption in captions for ngram in ngram_counts(caption.split())})
    scores = []
    for hypothesis, captions in zip(hypotheses, references, strict=True):
        mine, my_norms, my_length = plain_vector(hypothesis, frequencies, len(references))
        total = 0.0
        for caption in captions:
            theirs, their_norms, their_length = plain_vector(caption, frequencies, len(references))
            similarity = 0.0
            for n in range(MAX_N):
                product = sum(min(w, theirs[n].get(g, 0.0)) * theirs[n].get(g, 0.0) for g, w in mine[n].items())
                norm = my_norms[n] * their_norms[n]
                similarity += product / norm if norm else product
            total += similarity * math.exp(-((my_length - their_length) ** 2) / 72)
        scores.append(10 * total / MAX_N / len(captions))
    return scores


def plain_lcs(left: Sequence[str], right: Sequence[str]) -> int:
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def plain_rouge_l(hypothesis: str, references: Sequence[str]) -> float:
    words, split = hypothesis.split(" "), [reference.split(" ") for reference in references]
    precision = max(plain_lcs(words, other) / len(words) for other in split)
    recall = max(plain_lcs(words, other) / len(other) for other in split)
    return 2.44 * precision * recall / (recall + 1.44 * precision) if precision and recall else 0.0
