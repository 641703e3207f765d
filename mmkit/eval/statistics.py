"""Error bars and tests: percentile bootstrap over images (Efron & Tibshirani 1993, chapter 13; Koehn 2004 for corpus scores),
sign-flip permutation of paired scores (Fisher 1935; Good 2005, chapter 3), Holm's correction (1979).

Everything is a function of sums over samples, so one resample is one weighted sum: BLEU takes its counters, means take
(value, 1) pairs. Samples of one image are drawn together, because questions on one picture are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmkit.errors import InputError

Floats = NDArray[np.float64]


class PairedDifference(NamedTuple):
    """The difference of two systems' means on the same samples, its 95 % interval, and the number of samples."""

    difference: float
    low: float
    high: float
    n: int


class Figures(NamedTuple):
    """Figures of a whole set that no sums over its samples give, such as average precision, as a function of weights.

    Attributes:
        names: M names.
        of: f64[N], how often each sample counts -> f64[M]; NaN where a figure is not defined. Ones give the figures themselves.
        centred: Those of the names whose draws are moved so that their mean is the figure: a sum of squares adds the noise of
            the sample once, and every resample adds it once more, so that the draws lie beside the figure and not around it.
    """

    names: tuple[str, ...]
    of: Callable[[Floats], Floats]
    centred: tuple[str, ...] = ()


def cluster_numbers(clusters: Sequence[Hashable]) -> NDArray[np.int64]:
    """i64[N]: the labels as numbers from 0, in order of first appearance."""
    # Not sorted: labels may be numbers and texts, which do not compare.
    index: dict[Hashable, int] = {}
    return np.array([index.setdefault(label, len(index)) for label in clusters], dtype=np.int64)


def cluster_sums(values: ArrayLike, clusters: Sequence[Hashable] | None) -> Floats:
    """Sum the rows of each cluster.

    Args:
        values: [N, K].
        clusters: N labels (such as image ids), or None where every row stands alone.

    Returns:
        f64[C, K], clusters in order of first appearance.
    """
    rows = np.asarray(values, dtype=np.float64)
    if clusters is None:
        return rows
    if len(clusters) != len(rows):
        raise ValueError(f"{len(clusters)} cluster labels for {len(rows)} rows")
    labels = cluster_numbers(clusters)
    sums = np.zeros((int(labels.max(initial=-1)) + 1, rows.shape[1]))
    # add.at, since plain indexing would count a repeated label once.
    np.add.at(sums, labels, rows)
    return sums


def drawn_weights(count: int, *, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Draw clusters with replacement, many times.

    Args:
        count: Number of clusters C.
        resamples: Number of draws.
        seed: Seed of the draws; the same seed and C give the same draws.

    Yields:
        i64[C]: how often each cluster was drawn.
    """
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        # One draw at a time: a [B, C] matrix would take gigabytes on the VQAv2 images.
        yield np.bincount(rng.integers(0, count, count), minlength=count)


def resampled_sums(sums: Floats, *, resamples: int, seed: int) -> Floats:
    """Draw rows with replacement and add them up, many times.

    Args:
        sums: f64[C, K], one row a cluster.
        resamples: Number of draws B.
        seed: Seed of the draws; the same seed and C give the same draws, whatever K holds.

    Returns:
        f64[B, K].
    """
    out = np.empty((resamples, sums.shape[1]))
    for row, weights in zip(out, drawn_weights(len(sums), resamples=resamples, seed=seed), strict=True):
        row[:] = weights @ sums
    return out


def ratio_of_sums(sums: Floats) -> Floats:
    """Turn (total, count) columns into means.

    Args:
        sums: f64[B, 2 K]: K totals, then their K counts.

    Returns:
        f64[B, K]; NaN where a draw holds no sample of that kind.
    """
    half = sums.shape[1] // 2
    # A resample without any sample of a rare type divides 0 by 0; the NaN is wanted.
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[:, :half] / sums[:, half:]


def bootstrap_ci(
    values: ArrayLike,
    statistic: Callable[[Floats], Floats] = ratio_of_sums,
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Floats:
    """95 % percentile interval of statistics of resampled sums.

    Args:
        values: [N, K] additive statistics of each sample.
        statistic: f64[B, K] sums -> f64[B, M] statistics.
        clusters: N labels; the samples of one label are drawn together.
        resamples: Number of draws.
        seed: Seed of the draws.

    Returns:
        f64[M, 2]: low and high; NaN where no draw gave a value.
    """
    # The statistic is applied to sums, not averaged over samples: corpus BLEU is no mean of sentence scores.
    return _percentiles(statistic(resampled_sums(cluster_sums(values, clusters), resamples=resamples, seed=seed)))


def figures_ci(figures: Figures, clusters: Sequence[Hashable], *, resamples: int = 1000, seed: int = 0) -> Floats:
    """95 % interval of figures of weighted samples, from the draws that `bootstrap_ci` makes of the same clusters.

    Args:
        figures: What to compute of each draw.
        clusters: N labels; the samples of one label are drawn together.
        resamples: Number of draws.
        seed: Seed of the draws.

    Returns:
        f64[M, 2]: low and high; NaN where no draw gave a value. Of centred figures never below 0.
    """
    labels = cluster_numbers(clusters)
    count = int(labels.max(initial=-1)) + 1
    draws = drawn_weights(count, resamples=resamples, seed=seed)
    drawn = np.stack([figures.of(weights[labels].astype(np.float64)) for weights in draws])
    interval, value = _percentiles(drawn), figures.of(np.ones(len(labels)))
    for n, name in enumerate(figures.names):
        present = drawn[~np.isnan(drawn[:, n]), n]
        if name in figures.centred and len(present):
            interval[n] = np.maximum(0.0, interval[n] + value[n] - present.mean())
    return interval


def _percentiles(drawn: Floats) -> Floats:
    """f64[B, M] -> f64[M, 2]: the middle 95 % of each column, NaN aside."""
    interval = np.full((drawn.shape[1], 2), np.nan)
    for row, column in zip(interval, drawn.T, strict=True):
        # A rare answer type may be absent from some draws, and from all of them when there are few.
        present = column[~np.isnan(column)]
        if len(present):
            # Percentiles rather than a multiple of the standard error: draws of a corpus score need not be symmetric.
            row[:] = np.percentile(present, [2.5, 97.5])
    return interval


def mean_ci(
    values: Sequence[float], *, clusters: Sequence[Hashable] | None = None, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of a mean.

    Args:
        values: One value a sample.
        clusters: Labels of the samples to draw together.
        resamples: Number of draws.
        seed: Seed of the draws.

    Returns:
        Low and high.
    """
    # As total and count: clusters of unequal size change the denominator of a resample, too.
    columns = np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))], axis=1)
    low, high = bootstrap_ci(columns, clusters=clusters, resamples=resamples, seed=seed)[0]
    return float(low), float(high)


def paired_bootstrap(
    a: Mapping[Hashable, float],
    b: Mapping[Hashable, float],
    *,
    clusters: Mapping[Hashable, Hashable] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> PairedDifference:
    """Compare two systems on the same samples: mean of ``a - b`` and its 95 % interval.

    Args:
        a: Sample id -> score of the first system.
        b: Sample id -> score of the second.
        clusters: Sample id -> label (such as the image id) of samples to draw together.
        resamples: Number of draws.
        seed: Seed of the draws.

    Returns:
        The difference, the interval and the number of samples.

    Raises:
        InputError: The two systems were not scored on the same ids, or on none.
    """
    differences, labels = _paired_differences(a, b, clusters)
    low, high = mean_ci(differences, clusters=labels, resamples=resamples, seed=seed)
    return PairedDifference(float(np.mean(differences)), low, high, len(differences))


def _paired_differences(
    a: Mapping[Hashable, float], b: Mapping[Hashable, float], clusters: Mapping[Hashable, Hashable] | None
) -> tuple[list[float], list[Hashable] | None]:
    """``a - b`` of every sample and the samples' labels, in one order; refuses systems that were scored on other ids."""
    # No silent intersection: a difference over fewer samples than either score would look like one over all.
    if a.keys() != b.keys() or not a:
        # By their text, since ids of the two files may be numbers here and words there.
        odd = sorted(a.keys() ^ b.keys(), key=str)
        named = ", ".join(str(key) for key in odd[:5]) or "none at all"
        raise InputError(
            f"two systems can only be compared on the same ids; {len(odd)} are in one of them alone: {named}",
            mend="score both on the same file",
        )
    # Differences first, resampling second: what makes a picture hard for both systems cancels.
    return [a[key] - b[key] for key in a], None if clusters is None else [clusters[key] for key in a]


def paired_permutation(
    a: Mapping[Hashable, float],
    b: Mapping[Hashable, float],
    *,
    clusters: Mapping[Hashable, Hashable] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p-value of "both systems are equally good" from scores on the same samples.

    If they are, the two systems' scores of a sample might as well be exchanged, which flips the sign of its difference; the
    p-value is the share of all sign patterns whose mean difference is at least as far from 0 as the observed one (Fisher 1935;
    Good 2005, chapter 3). Samples of one cluster are exchanged together. Of 0/1 scores without clusters this is the exact
    McNemar test.

    Args:
        a: Sample id -> score of the first system, on any scale.
        b: Sample id -> score of the second.
        clusters: Sample id -> label (such as the image id) of samples to exchange together.
        resamples: Number of random sign patterns; where there are no more patterns than that, all of them are counted and the
            p-value is exact.
        seed: Seed of the patterns.

    Returns:
        p in (0, 1]; never 0, as the observed pattern counts as one of the drawn ones (Phipson & Smyth 2010).

    Raises:
        InputError: The two systems were not scored on the same ids, or on none.
        ValueError: Fewer than one resample.
    """
    if resamples < 1:
        raise ValueError(f"resamples is a whole number from 1, not {resamples}")
    differences, labels = _paired_differences(a, b, clusters)
    sums = cluster_sums([[value] for value in differences], labels)[:, 0]
    # Rounding must not make a tie a smaller value: scores are tenths, and many patterns have exactly the observed sum.
    slack = 1e-9 * float(np.abs(sums).sum())
    # A cluster without a difference has no sign.
    sums = sums[np.abs(sums) > 1e-12]
    # With count clusters there are 2^count patterns; a shift by thousands would only be a very long number.
    count = len(sums)
    exact = count < resamples.bit_length() and 2**count <= resamples
    least = abs(float(sums.sum())) - slack
    rng = np.random.default_rng(seed)
    total, as_far = 2**count if exact else resamples, 0
    # As many patterns at a time as fit 32 MB: VQAv2 has 40,504 pictures.
    step = max(1, 2**22 // max(1, count))
    flips: NDArray[Any]
    for start in range(0, total, step):
        rows = min(step, total - start)
        if exact:
            # The bits of a counter are all patterns, each once.
            flips = np.arange(start, start + rows)[:, None] >> np.arange(count) & 1
        else:
            flips = np.unpackbits(np.frombuffer(rng.bytes(rows * -(-count // 8)), np.uint8).reshape(rows, -1), axis=1)[:, :count]
        as_far += int((np.abs((1.0 - 2.0 * flips) @ sums) >= least).sum())
    return as_far / total if exact else (as_far + 1) / (total + 1)


def smallest_p(clusters: int) -> float:
    """The smallest p-value that `paired_permutation` can give for so many clusters, whatever their differences are.

    Args:
        clusters: Their number, such as that of the pictures.

    Returns:
        2 / 2^n: the observed signs and all of them flipped are always as far from zero as the observed ones.
    """
    return min(1.0, 2.0 ** (1 - clusters))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, so that all below 0.05 are true findings with probability 0.95 (Holm 1979).

    Args:
        p_values: Those of one family of tests, such as one system against each other one.

    Returns:
        Adjusted ones in the same order: the k-th smallest of m times m - k + 1, never below a smaller one's, at most 1.

    Raises:
        ValueError: One is not in [0, 1].
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values are in [0, 1], not {list(p_values)}")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        # The running maximum keeps the order: a test is not passed where one with a smaller p-value is not.
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
