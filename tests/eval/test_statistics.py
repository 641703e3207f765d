"""Bootstrap intervals and paired tests: known cases, clusters, pairs, and the same seed giving the same numbers."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.errors import InputError
from mmkit.eval.scorers.bleu import bleu_from_statistics
from mmkit.eval.statistics import (
    Figures,
    bootstrap_ci,
    cluster_sums,
    figures_ci,
    holm,
    mean_ci,
    paired_bootstrap,
    paired_permutation,
    ratio_of_sums,
    resampled_sums,
    smallest_p,
)


def test_interval_of_a_mean_is_near_the_normal_one() -> None:
    values = np.random.default_rng(3).normal(5.0, 2.0, 400)
    low, high = mean_ci(values.tolist(), resamples=2000)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.05)
    assert high == pytest.approx(values.mean() + half, abs=0.05)


def test_same_seed_same_interval() -> None:
    values = [0.0, 1.0, 0.3, 0.6, 0.9] * 4
    assert mean_ci(values, seed=1) == mean_ci(values, seed=1)
    assert mean_ci(values, seed=1) != mean_ci(values, seed=2)


def test_constant_values_have_no_width() -> None:
    assert mean_ci([0.5] * 7) == (0.5, 0.5)
    assert mean_ci([0.25]) == (0.25, 0.25)


def test_cluster_sums_keep_order_and_totals() -> None:
    sums = cluster_sums([[1.0, 1], [2, 1], [4, 1]], ["x", "y", "x"])
    assert sums.tolist() == [[5, 2], [2, 1]]
    with pytest.raises(ValueError, match="2 cluster labels for 1 rows"):
        cluster_sums([[1.0]], [1, 2])


def test_clusters_widen_the_interval() -> None:
    # Twenty questions on each picture that stand or fall together are worth one question a picture.
    values = [float(picture % 2) for picture in range(30) for _ in range(20)]
    pictures = [picture for picture in range(30) for _ in range(20)]
    alone, together = mean_ci(values), mean_ci(values, clusters=pictures)
    assert together[1] - together[0] > 3 * (alone[1] - alone[0])


def test_a_kind_missing_from_a_resample_is_left_out_of_its_interval() -> None:
    columns = np.array([[1.0, 1], [0, 0], [0, 0]])
    interval = bootstrap_ci(columns, resamples=200)
    assert interval.tolist() == [[1.0, 1.0]]
    assert np.isnan(bootstrap_ci([[0.0, 0]], resamples=3)).all()
    assert np.isnan(ratio_of_sums(np.array([[0.0, 0.0]]))).all()


def test_corpus_bleu_is_resampled_as_a_corpus_score() -> None:
    rng = np.random.default_rng(0)
    guess = np.tile([10, 9, 8, 7], (50, 1))
    correct = np.column_stack([rng.integers(3, 10, 50), rng.integers(2, 7, 50), rng.integers(0, 5, 50), rng.integers(0, 3, 50)])
    statistics = np.column_stack([np.full(50, 10), np.full(50, 10), guess, correct])
    interval = bootstrap_ci(statistics, bleu_from_statistics, resamples=500)
    corpus = bleu_from_statistics(statistics.sum(axis=0))
    assert interval.shape == (4, 2)
    assert (interval[:, 0] < corpus).all()
    assert (interval[:, 1] > corpus).all()


def test_resampled_sums_are_sums_of_as_many_rows() -> None:
    sums = resampled_sums(np.array([[1.0, 1], [10, 1], [100, 1]]), resamples=50, seed=0)
    assert sums.shape == (50, 2)
    assert (sums[:, 1] == 3).all()
    assert set(sums[:, 0]) <= {a + b + c for a in (1, 10, 100) for b in (1, 10, 100) for c in (1, 10, 100)}


def test_paired_bootstrap_sees_a_small_steady_gain() -> None:
    rng = np.random.default_rng(1)
    a = {key: float(value) for key, value in enumerate(rng.random(200))}
    b = {key: value - 0.02 for key, value in reversed(a.items())}
    result = paired_bootstrap(a, b)
    assert result.difference == pytest.approx(0.02)
    assert (result.low, result.high) == pytest.approx((0.02, 0.02))
    assert result.n == 200


def test_paired_bootstrap_by_picture() -> None:
    a = {n: float(n // 10 % 2) for n in range(100)}
    b = dict.fromkeys(range(100), 0.5)
    alone = paired_bootstrap(a, b)
    together = paired_bootstrap(a, b, clusters={n: n // 10 for n in range(100)})
    assert together.difference == alone.difference == 0
    assert together.high - together.low > alone.high - alone.low


@pytest.mark.parametrize(("a", "b", "named"), [({1: 1.0}, {2: 1.0}, "1, 2"), ({}, {}, "none at all")])
def test_other_ids_are_refused(a: dict, b: dict, named: str) -> None:
    for test in (paired_bootstrap, paired_permutation):
        with pytest.raises(InputError, match=named):
            test(a, b)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 5))
def test_interval_lies_within_the_values(values: list[float], seed: int) -> None:
    low, high = mean_ci(values, resamples=50, seed=seed)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12


def mcnemar(wins: int, losses: int) -> float:
    """The exact two-sided McNemar test in closed form: a binomial tail with probability one half, twice."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    return min(1.0, 2 * tail)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 5), (9, 2), (2, 9), (12, 0)])
def test_of_zeros_and_ones_it_is_the_exact_mcnemar_test(wins: int, losses: int) -> None:
    rows = [(1.0, 0.0)] * wins + [(0.0, 1.0)] * losses + [(1.0, 1.0)] * 7 + [(0.0, 0.0)] * 4
    a, b = ({n: row[side] for n, row in enumerate(rows)} for side in (0, 1))
    assert paired_permutation(a, b) == pytest.approx(mcnemar(wins, losses), abs=1e-12)


def test_many_samples_come_near_mcnemar() -> None:
    rows = [(1.0, 0.0)] * 120 + [(0.0, 1.0)] * 90 + [(1.0, 1.0)] * 500
    a, b = ({n: row[side] for n, row in enumerate(rows)} for side in (0, 1))
    expected = mcnemar(120, 90)
    # Four standard errors of a share of 20,000 draws.
    assert paired_permutation(a, b, resamples=20_000) == pytest.approx(expected, abs=4 * math.sqrt(expected / 20_000))


def test_the_textbook_case_of_darwins_maize() -> None:
    # Fisher (1935), section 21: of Darwin's 15 pairs' 32,768 sign patterns 1726 have a sum as far from 0 as the observed 314.
    pairs = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    a = {n: float(value) for n, value in enumerate(pairs)}
    assert paired_permutation(a, dict.fromkeys(a, 0.0), resamples=2**15) == 1726 / 2**15


def test_pictures_are_exchanged_whole() -> None:
    # Ten questions on each of 6 pictures, all won by the first system: as far as 6 pictures can tell, 2 of 64 patterns.
    a, b = dict.fromkeys(range(60), 1.0), dict.fromkeys(range(60), 0.0)
    assert paired_permutation(a, b, clusters={n: n // 10 for n in range(60)}) == 2 / 64
    assert paired_permutation(a, b, resamples=999) == 1 / 1000


def test_same_seed_same_p_value_and_order_does_not_matter() -> None:
    rng = np.random.default_rng(5)
    a, b = ({n: float(v) for n, v in enumerate(rng.random(100))} for _ in range(2))
    assert paired_permutation(a, b, seed=1) == paired_permutation(a, b, seed=1) != paired_permutation(a, b, seed=2)
    assert paired_permutation(dict(reversed(a.items())), b, seed=1) == pytest.approx(paired_permutation(a, b), abs=0.03)
    with pytest.raises(ValueError, match="resamples"):
        paired_permutation(a, b, resamples=0)


def test_p_values_of_equal_systems_are_even() -> None:
    rng = np.random.default_rng(7)
    found = []
    for _ in range(300):
        scores = rng.choice([0, 0.3, 0.6, 0.9, 1.0], size=(2, 40))
        a, b = ({n: float(v) for n, v in enumerate(side)} for side in scores)
        found.append(paired_permutation(a, b, resamples=199))
    # At 5 % about 15 of 300 are found by chance; 30 has a probability below 0.001.
    assert sum(p <= 0.05 for p in found) < 30
    assert 0.4 < float(np.mean(found)) < 0.6


TENTHS = st.lists(st.tuples(*[st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0])] * 2, st.integers(0, 3)), min_size=1, max_size=9)


@settings(max_examples=100, deadline=None)
@given(TENTHS, st.booleans())
def test_permutation_equals_the_plain_count(rows: list[tuple[float, float, int]], clustered: bool) -> None:
    a, b, label = ({n: row[k] for n, row in enumerate(rows)} for k in range(3))
    groups = {n: label[n] if clustered else n for n in label}
    # In whole tenths, so that ties are ties.
    sums = [sum(round(10 * a[n]) - round(10 * b[n]) for n in groups if groups[n] == g) for g in sorted(set(groups.values()))]
    patterns = list(itertools.product((1, -1), repeat=len(sums)))
    far = sum(abs(sum(s * v for s, v in zip(p, sums, strict=True))) >= abs(sum(sums)) for p in patterns)
    p = paired_permutation(a, b, clusters=groups)
    assert p == pytest.approx(far / len(patterns), abs=1e-12)
    assert paired_permutation(b, a, clusters=groups) == pytest.approx(p, abs=1e-12)
    # Random patterns: the same within five standard errors, and never 0.
    if len(sums) >= 8:
        assert paired_permutation(a, b, clusters=groups, resamples=200) == pytest.approx(p, abs=0.18)


def test_holm_of_the_papers_kind() -> None:
    # m = 4: 0.005 * 4, 0.01 * 3, 0.03 * 2 and 0.04 * 1, which is raised to the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="p-values"):
            holm([0.5, wrong])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_lies_between_p_and_bonferroni_and_keeps_the_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1.0, len(p_values) * p) + 1e-12
    for (p, q), (r, s) in itertools.combinations(zip(p_values, adjusted, strict=True), 2):
        assert (q <= s) if p < r else (q >= s)


def test_figures_of_weights_use_the_draws_of_the_means() -> None:
    values = np.random.default_rng(1).random(50)
    clusters = [n // 3 for n in range(50)]
    mean = Figures(("mean", "none"), lambda weights: np.array([weights @ values / weights.sum(), math.nan]))
    found = figures_ci(mean, clusters, resamples=200, seed=4)
    assert found[0] == pytest.approx(mean_ci(values.tolist(), clusters=clusters, resamples=200, seed=4))
    assert np.isnan(found[1]).all()


def test_draws_of_a_sum_of_squares_are_centred() -> None:
    # Chi-square of a fair coin: 200 throws against their expectation, plain resamples add the noise once more.
    coin = np.random.default_rng(5).integers(0, 2, 200)

    def chi(weights: np.ndarray) -> np.ndarray:
        heads = weights @ coin
        return np.array([(heads - 100.0) ** 2 / 50, (heads - 100.0) ** 2 / 50])

    plain, centred = figures_ci(Figures(("plain", "centred"), chi, ("centred",)), list(range(200)), resamples=2000)
    value = chi(np.ones(200))[0]
    assert centred[0] <= value <= centred[1] and centred[0] >= 0
    # One more degree of freedom's worth of noise: the mean of the draws lies about 1 above the figure.
    assert plain[1] - centred[1] == pytest.approx(1, abs=0.2)


def p_of(differences: list[float], clusters: list[int] | range, *, resamples: int = 5000, seed: int = 0) -> float:
    """The p-value of differences as they are."""
    mine = dict(enumerate(differences))
    labels = dict(enumerate(clusters))
    return paired_permutation(mine, dict.fromkeys(mine, 0.0), clusters=labels, resamples=resamples, seed=seed)


def brute_force(differences: list[float], clusters: list[int]) -> float:
    """All sign patterns over clusters, by the definition."""
    sums = [sum(d for d, c in zip(differences, clusters, strict=True) if c == k) for k in sorted(set(clusters))]
    observed = abs(sum(sums)) - 1e-9
    patterns = list(itertools.product((1, -1), repeat=len(sums)))
    return sum(abs(sum(s * x for s, x in zip(p, sums, strict=True))) >= observed for p in patterns) / len(patterns)


@given(
    st.lists(st.tuples(st.sampled_from([-1.0, -2 / 3, -0.3, 0.0, 0.3, 1.0]), st.integers(0, 7)), min_size=1, max_size=20),
)
def test_few_clusters_are_exact(pairs: list[tuple[float, int]]) -> None:
    differences, clusters = [d for d, _ in pairs], [c for _, c in pairs]
    assert p_of(differences, clusters) == pytest.approx(brute_force(differences, clusters))


def test_no_p_is_below_what_the_number_of_clusters_allows() -> None:
    for n in range(1, 9):
        assert p_of([1.0] * n, range(n)) == smallest_p(n)
    assert smallest_p(0) == 1.0 and smallest_p(5) >= 0.05 > smallest_p(6)
    # Six answers on one picture say as much as one.
    assert p_of([1.0] * 6, [0] * 6) == 1.0


def test_many_clusters_are_sampled_near_the_exact_value() -> None:
    rng = random.Random(3)
    differences = [rng.choice([-1.0, 0.0, 1.0]) + 0.15 for _ in range(14)]
    exact = brute_force(differences, list(range(14)))
    assert p_of(differences, range(14), resamples=5000) == pytest.approx(exact, abs=0.03)


def test_p_is_seeded_and_never_zero() -> None:
    assert p_of([1.0] * 400, range(400)) == 1 / 5001 == p_of([1.0] * 400, range(400))
    mixed = [1.0, -1.0, 0.5] * 100
    assert p_of(mixed, range(300), seed=0) != p_of(mixed, range(300), seed=1)
    assert p_of([0.0, 0.0], [1, 2]) == 1.0


def test_under_no_difference_five_in_a_hundred_are_below_five_per_cent() -> None:
    rng = random.Random(0)
    below = [p_of([rng.gauss(0, 1) for _ in range(20)], range(20), seed=i) < 0.05 for i in range(200)]
    assert 2 <= sum(below) <= 20


def test_holm_of_1979() -> None:
    # The smallest times m, the next times m - 1, and never below one before.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([0.6, 0.9]) == [1.0, 1.0]
