"""Shards in windows and mixtures by weight: still a pure function of (seed, epoch, position), and cheap at any position."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.data.layout import Layout, Part, join
from mmkit.data.loader import ReplacingSet
from mmkit.data.order import MixedOrder, Order, Position, ShuffledOrder, make_order, shares
from mmkit.data.skipped import SampleError

CHUNKS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def part(chunks: list[int], window: int | None, weight: float | None = None) -> Part:
    return Part(np.asarray(chunks, dtype=np.int64), window, weight)


def epoch(order: Order, size: int, number: int = 0) -> list[int]:
    return [p.index for p in order.positions(number * size, size)]


@settings(deadline=None)
@given(chunks=CHUNKS, window=st.integers(1, 120), seed=st.integers(0, 2**32), number=st.integers(0, 3))
def test_an_epoch_in_windows_is_a_permutation(chunks: list[int], window: int, seed: int, number: int) -> None:
    size = sum(chunks)
    found = make_order(Layout((part(chunks, window),)), seed).positions(number * size, size)
    assert sorted(p.index for p in found) == list(range(size))
    assert {p.epoch for p in found} == {number}


@settings(deadline=None)
@given(chunks=CHUNKS, window=st.integers(1, 120), seed=st.integers(0, 99))
def test_whole_shards_share_a_window(chunks: list[int], window: int, seed: int) -> None:
    """Once a shard has begun, at most a window's worth and a shard more of others comes before its last sample."""
    size, starts = sum(chunks), np.cumsum([0, *chunks])
    order = epoch(make_order(Layout((part(chunks, window),)), seed), size)
    places = np.argsort(order)
    for first, last in itertools.pairwise(starts):
        mine = places[first:last]
        assert mine.max() - mine.min() < window + 2 * max(chunks)


@settings(deadline=None)
@given(chunks=CHUNKS, window=st.integers(1, 60), start=st.integers(0, 150), first=st.integers(0, 20), second=st.integers(0, 20))
def test_any_position_is_found_without_those_before(chunks: list[int], window: int, start: int, first: int, second: int) -> None:
    layout = Layout((part(chunks, window),))
    whole = make_order(layout, 3).positions(0, start + first + second)
    assert make_order(layout, 3).positions(start, first + second) == whole[start:]
    order = make_order(layout, 3)
    assert order.positions(start + first, second) == whole[start + first :]
    assert order.positions(start, first) == whole[start : start + first]


def test_shards_and_samples_are_shuffled_anew_each_epoch() -> None:
    order = ShuffledOrder(part([10] * 20, 40), 0)
    epochs = [epoch(order, 200, n) for n in range(3)]
    shards = [[i // 10 for i in e] for e in epochs]
    assert len({tuple(e) for e in epochs}) == 3 and len({tuple(s) for s in shards}) == 3
    # A window mixes its four shards: runs of one shard are short.
    assert max(np.diff(np.flatnonzero(np.diff(shards[0])))) < 8
    assert {len(set(shards[0][i : i + 40])) for i in range(0, 200, 40)} == {4}


def test_one_window_is_a_plain_permutation() -> None:
    # As before there were windows, so that a set of a few shards keeps its order.
    expected = np.random.default_rng([7, 2]).permutation(12).tolist()
    assert epoch(make_order(Layout((part([3, 4, 5], 12),)), 7), 12, 2) == expected
    assert epoch(make_order(Layout.flat(12), 7), 12, 2) == expected


def test_a_billion_samples_cost_what_a_window_costs() -> None:
    layout = Layout((part([10_000] * 100_000, 100_000),))
    tracemalloc.start()
    found = make_order(layout, 0).positions(999_999_000 // 2, 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len({p.index for p in found}) == 64 and len({p.index // 10_000 for p in found}) > 5
    assert peak < 50e6


def test_shares_are_the_weights() -> None:
    assert shares([1, 1]).tolist() == [5000, 5000]
    assert shares([2.0, 1.0]).tolist() == [6667, 3333]
    assert shares([0.6, 0.3, 0.1]).tolist() == [6000, 3000, 1000]
    assert shares([1, 1, 1]).sum() == 10_000


def test_a_mixture_draws_by_weight_and_goes_through_each_source() -> None:
    layout = join([Layout((part([5, 5], 4),)), Layout.flat(1000)], [3.0, 1.0])
    order = make_order(layout, 1)
    assert isinstance(order, MixedOrder) and layout.size == 1010
    found = order.positions(0, 10_000)
    small = [p for p in found if p.index < 10]
    assert len(small) == 7500
    # Each source goes through its own epochs, without gap or duplicate.
    for n in range(750):
        assert sorted(p.index for p in small[10 * n : 10 * n + 10]) == list(range(10))
        assert {p.epoch for p in small[10 * n : 10 * n + 10]} == {n}
    large = [p.index for p in found if p.index >= 10]
    assert sorted(large[:1000]) == list(range(10, 1010))
    # No source runs ahead.
    assert abs(sum(p.index < 10 for p in found[:1000]) - 750) < 60
    assert order.positions(12_345, 50) == make_order(layout, 1).positions(12_300, 95)[45:]


def test_equal_sources_of_a_mixture_are_not_in_step() -> None:
    order = make_order(join([Layout.flat(50), Layout.flat(50)], [1.0, 1.0]), 0)
    found = [p.index for p in order.positions(0, 200)]
    first, second = ([i % 50 for i in found if i // 50 == n][:50] for n in (0, 1))
    assert first != second


def test_without_weights_sources_are_one_after_the_other_in_one_epoch() -> None:
    layout = join([Layout((part([5, 5], 4),)), Layout.flat(3)], [None, None])
    assert len(layout.parts) == 1 and layout.parts[0].window == 4
    assert sorted(epoch(make_order(layout, 0), 13)) == list(range(13))


def test_a_replacement_comes_from_the_same_shard_while_that_has_good_samples() -> None:
    class Samples:
        bad = frozenset([0, 1, 2, 3, 12, 13, 14, 15, 16, 17, 18, 19, 10, 11])

        def __len__(self) -> int:
            return 30

        def load(self, index: int, rng: np.random.Generator) -> int:
            if index in self.bad:
                raise SampleError("bad")
            return index

        def describe(self, index: int) -> tuple[str, str]:
            return "numbers", str(index)

    draw = ReplacingSet(Samples(), 0, Layout((part([10, 10, 10], None),)))
    assert all(draw[Position(e, i)].sample < 10 for e in range(20) for i in range(4))
    # The second shard is bad throughout: others stand in for it.
    found = {draw[Position(e, 15)].sample for e in range(20)}
    assert found and all(i not in range(10, 20) for i in found)


def test_layout_of_what_is_kept() -> None:
    layout = join([Layout.flat(3), Layout.flat(2)], [1.0, 2.0])
    kept = layout.keep(np.asarray([True, False, True, False, False]))
    assert [(p.chunks.tolist(), p.weight) for p in kept.parts] == [([2], 1.0)]
    with pytest.raises(AssertionError):
        ShuffledOrder(part([2, 0], None), 0)


def test_a_source_in_one_piece_mixes_with_shards_in_a_list() -> None:
    layout = join([Layout.flat(2000), Layout((part([100] * 20, 400),))], [None, None])
    order = epoch(make_order(layout, 0), 4000)
    assert sorted(order) == list(range(4000))
    share = [np.mean([i < 2000 for i in order[n : n + 400]]) for n in range(0, 4000, 400)]
    # In one piece it would be 0 or 1 nearly everywhere.
    assert all(0.1 < s < 0.9 for s in share), share
