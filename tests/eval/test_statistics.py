"""Bootstrap intervals: known cases, clusters, pairs, and the same seed giving the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.errors import InputError
from mmkit.eval.scorers.bleu import bleu_from_statistics
from mmkit.eval.statistics import bootstrap_ci, cluster_sums, mean_ci, paired_bootstrap, ratio_of_sums, resampled_sums


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
def test_paired_bootstrap_refuses_other_ids(a: dict, b: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        paired_bootstrap(a, b)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 5))
def test_interval_lies_within_the_values(values: list[float], seed: int) -> None:
    low, high = mean_ci(values, resamples=50, seed=seed)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
