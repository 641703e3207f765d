from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmkit.eval.report.significance import PERMUTATIONS, holm, permutation_test, smallest_p


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
    assert permutation_test(differences, clusters, seed=0) == pytest.approx(brute_force(differences, clusters))


def test_six_wins_of_six_are_the_sign_test() -> None:
    assert permutation_test([1.0] * 6, range(6), seed=0) == 2 / 64
    # The same six answers on one picture say as much as one.
    assert permutation_test([1.0] * 6, [0] * 6, seed=0) == 1.0


def test_no_p_is_below_what_the_number_of_clusters_allows() -> None:
    for n in range(1, 9):
        assert permutation_test([1.0] * n, range(n), seed=0) == smallest_p(n)
    assert smallest_p(0) == 1.0 and smallest_p(5) >= 0.05 > smallest_p(6)


def test_many_clusters_are_sampled_near_the_exact_value() -> None:
    rng = random.Random(3)
    differences = [rng.choice([-1.0, 0.0, 1.0]) + 0.15 for _ in range(14)]
    exact = brute_force(differences, list(range(14)))
    assert PERMUTATIONS < 2**14
    assert permutation_test(differences, range(14), seed=0) == pytest.approx(exact, abs=0.03)


def test_p_is_seeded_and_never_zero() -> None:
    differences = [1.0] * 400
    p = permutation_test(differences, range(400), seed=0)
    assert p == 1 / (PERMUTATIONS + 1) == permutation_test(differences, range(400), seed=0)
    mixed = [1.0, -1.0, 0.5] * 100
    assert permutation_test(mixed, range(300), seed=0) != permutation_test(mixed, range(300), seed=1)
    assert permutation_test([0.0, 0.0], [1, 2], seed=0) == 1.0


def test_under_no_difference_five_in_a_hundred_are_below_five_per_cent() -> None:
    rng = random.Random(0)
    below = [permutation_test([rng.gauss(0, 1) for _ in range(20)], range(20), seed=i) < 0.05 for i in range(200)]
    assert 2 <= sum(below) <= 20


def test_holm() -> None:
    # Holm 1979: the smallest times m, the next times m - 1, and never below one before.
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0} and holm({}) == {}
