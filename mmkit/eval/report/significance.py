"""Is one system really better than another? Paired tests on the same samples, corrected for their number.

The interval is the paired bootstrap over pictures (Koehn 2004). The p-value is a paired permutation test (Fisher's
randomisation, Good 2005, section 3.2.1; Yeh 2000 for evaluations): if the two systems were alike, each picture's difference
could as well have the other sign. Holm's step-down method (1979) corrects the p-values of one report.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from mmkit.eval.statistics import Floats, cluster_sums

PERMUTATIONS = 5000  # sign patterns of a test, where a report has no more than a hundred
LEVEL = 0.05  # of the family of all tests in a report
_CHUNK = 1 << 22  # signs drawn at a time: some MB, whatever the number of pictures


def permutation_test(
    differences: Sequence[float], clusters: Sequence[Hashable], *, seed: int, patterns: int = PERMUTATIONS
) -> float:
    """Two-sided p-value of a mean difference being zero, by flipping the signs of whole clusters.

    Args:
        differences: One value a sample, system minus baseline.
        clusters: Their labels (such as the picture); samples of one label are flipped together.
        seed: Seed of the flips.
        patterns: How many sign patterns to draw.

    Returns:
        p, at least 1 / (`patterns` + 1); exact where all sign patterns are no more than `patterns`.
    """
    sums = cluster_sums(np.asarray(differences, dtype=np.float64)[:, None], clusters)[:, 0]
    # Pictures on which both are equal have no sign to flip.
    sums = sums[sums != 0]
    # Sums of thirds and tenths differ in their last bits with the order of adding; equal must stay equal.
    observed = abs(sums.sum()) - 1e-9
    if not len(sums):
        return 1.0
    if 2 ** len(sums) <= patterns:
        every = (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1
        return float(np.mean(np.abs((2 * every - 1) @ sums) >= observed))
    return (1 + _extreme(sums, observed, seed, patterns)) / (patterns + 1)


def smallest_p(clusters: int) -> float:
    """The smallest p-value that `permutation_test` can give for so many clusters, whatever their differences are.

    Args:
        clusters: Their number, such as that of the pictures.

    Returns:
        2 / 2^n: the observed signs and all of them flipped are always as far from zero as the observed ones.
    """
    return min(1.0, 2.0 ** (1 - clusters))


def _extreme(sums: Floats, observed: float, seed: int, patterns: int) -> int:
    """How many of `patterns` random sign patterns give a total at least as large as the observed one."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(sums))
    found = 0
    for start in range(0, patterns, rows):
        flips = rng.integers(0, 2, (min(rows, patterns - start), len(sums)), dtype=np.int8)
        # total with signs = total - 2 * (those flipped): one product instead of a matrix of +-1 as floats.
        found += int(np.sum(np.abs(sums.sum() - 2 * (flips @ sums)) >= observed))
    return found


def holm(values: Mapping[Hashable, float]) -> dict[Hashable, float]:
    """Adjust p-values so that all claims made at a level hold together at that level (Holm 1979).

    Args:
        values: Name of a test -> its p-value.

    Returns:
        Name -> adjusted p-value, in the order of `values`.
    """
    adjusted: dict[Hashable, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        # Never below an adjusted one before it, or a larger p could pass where a smaller one fails.
        largest = max(largest, min(1.0, (len(values) - rank) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in values}
