"""How a step is cut into micro-batches: even, packed by tokens, grouped by length; the step itself stays the same."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mmkit.config import BatchingConfig
from mmkit.data.batching import GroupedOrder, Lengths, PackedBatches, Share, deal, make_batches
from mmkit.data.layout import Layout, Part
from mmkit.data.order import Order, Position, make_order
from mmkit.errors import InputError


def lengths(size: int, seed: int = 0, longest: int = 300) -> Lengths:
    rng = np.random.default_rng(seed)
    return Lengths(rng.integers(5, longest, size).astype(np.int32), rng.random(size) < 0.3)


def packed(size: int = 400, *, world: int = 1, rank: int = 0, max_tokens: int = 1000, batch_size: int = 16) -> PackedBatches:
    order = make_order(Layout.flat(size), 3)
    return PackedBatches(order, lengths(size), batch_size=batch_size, max_tokens=max_tokens, share=Share(rank, world))


@settings(deadline=None)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=40), st.data())
def test_dealing_uses_everything_once_and_leaves_no_bin_empty(sizes: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    bins = deal(sizes, count)
    assert sorted(i for members in bins for i in members) == list(range(len(sizes)))
    assert all(bins) and len(bins) == count
    weights = [sum(sizes[i] for i in members) for members in bins]
    # No bin is heavier than the average by more than one thing (Graham's bound, and 1 a thing for those without weight).
    assert max(weights) <= sum(sizes) / count + max(sizes) + len(sizes)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_packed_steps_hold_the_samples_of_the_plain_order_within_the_bound(world: int) -> None:
    known, order = lengths(400), make_order(Layout.flat(400), 3)
    shares = [packed(world=world, rank=rank) for rank in range(world)]
    for step in range(40):
        each = [share.step(step) for share in shares]
        assert len({len(mine) for mine in each}) == 1, "every process runs the same number of forward passes"
        assert len(each[0]) == shares[0].rounds(step)
        batches = [batch for mine in each for batch in mine]
        assert all(batches)
        assert max(int(known.tokens[[p.index for p in batch]].sum()) for batch in batches) <= 1000
        drawn = [p for batch in batches for p in batch]
        assert sorted(drawn, key=lambda p: p.index) == sorted(order.positions(step * 16, 16), key=lambda p: p.index)


def test_packed_processes_have_about_equal_work() -> None:
    known = lengths(400)
    loads = [
        [sum(int(known.tokens[p.index]) for p in batch) for batch in packed(world=4, rank=rank).step(step)]
        for rank in range(4)
        for step in range(20)
    ]
    rounds = [[loads[rank * 20 + step][0] for rank in range(4)] for step in range(20)]
    assert np.mean([max(r) / np.mean(r) for r in rounds]) < 1.2


def test_packed_batches_are_a_function_of_the_step() -> None:
    assert list(packed().stream(7, 12)) == list(packed().stream(0, 12))[sum(packed().rounds(s) for s in range(7)) :]


def test_a_sample_beyond_the_bound_is_refused_before_training() -> None:
    with pytest.raises(InputError, match=r"batching\.max_tokens: the longest sample has \d+ tokens, a micro-batch at most 100"):
        packed(max_tokens=100)


def test_a_batch_that_leaves_a_process_without_samples_is_refused() -> None:
    with pytest.raises(InputError, match="global batch 15 is no multiple of world size 2"):
        packed(batch_size=15, world=2)


def grouped(size: int = 500, *, window: int = 10, steps: int = 200, epoch: bool = True) -> tuple[GroupedOrder, Lengths]:
    known = lengths(size)
    order = make_order(Layout.flat(size), 3)
    whole = size if epoch else None
    return GroupedOrder(order, known, batch_size=8, steps=steps, epoch=whole, seed=3, window=window), known


def drawn(order: Order, first: int, count: int) -> list[tuple[int, int]]:
    return sorted((p.epoch, p.index) for p in order.positions(first, count))


@pytest.mark.parametrize("window", [1, 10, 64])
def test_a_grouped_run_draws_what_the_plain_one_draws(window: int) -> None:
    plain = make_order(Layout.flat(500), 3)
    # 62 whole batches an epoch and one over its end; the run ends in the middle of the third.
    for steps in (1, 7, 63, 150):
        order, _ = grouped(window=window, steps=steps)
        assert drawn(order, 0, steps * 8) == drawn(plain, 0, steps * 8)


def test_a_grouped_epoch_of_a_small_set_has_every_sample_once() -> None:
    order, _ = grouped(size=100, window=64, steps=50)
    for epoch in range(3):
        # Of the batch over the end each epoch has its part.
        indices = [p.index for p in order.positions(0, 400) if p.epoch == epoch]
        assert sorted(indices) == list(range(100))
    batches = [[p.index for p in order.positions(step * 8, 8)] for step in range(50)]
    assert sum(len(b) - len(set(b)) for b in batches) <= 1 * 4, "no batch pools copies of a sample from several epochs"


def test_a_grouped_mixture_by_weight_ends_with_the_run() -> None:
    parts = (Part(np.asarray([30]), None, 0.5), Part(np.asarray([70]), None, 0.5))
    plain = make_order(Layout(parts), 3)
    order = GroupedOrder(plain, lengths(100), batch_size=8, steps=13, epoch=None, seed=3, window=10)
    assert drawn(order, 0, 13 * 8) == drawn(plain, 0, 13 * 8)
    assert order.positions(13 * 8, 8) == plain.positions(13 * 8, 8)


def test_grouped_batches_are_of_one_modality_and_near_in_length() -> None:
    order, known = grouped(window=40)
    batches = [[p.index for p in order.positions(step * 8, 8)] for step in range(40)]
    mixed = [b for b in batches if len({bool(known.text_only[i]) for i in b}) > 1]
    # The one where pictures end and text begins.
    assert len(mixed) <= 1
    spread = [int(np.ptp(known.tokens[b])) for b in batches if b not in mixed]
    assert np.mean(spread) < 25, "unsorted batches of 8 spread over more than 200 tokens"


def test_grouped_batches_come_in_random_order_but_for_the_longest() -> None:
    order, known = grouped(window=40)
    sums = [int(known.tokens[[p.index for p in order.positions(step * 8, 8)]].max()) for step in range(40)]
    assert sums[0] == max(sums)
    assert any(a < b for a, b in pairwise(sums[1:])) and any(a > b for a, b in pairwise(sums[1:]))


@settings(deadline=None)
@given(start=st.integers(0, 300), first=st.integers(0, 50), second=st.integers(0, 50))
def test_grouped_positions_join_without_a_gap(start: int, first: int, second: int) -> None:
    order, again = grouped()[0], grouped()[0]
    assert order.positions(start, first) + again.positions(start + first, second) == order.positions(start, first + second)


def test_every_kind_is_made_from_the_recipe() -> None:
    known = lengths(100)
    common = {"seed": 1, "steps": 9, "batch_size": 8, "micro_batch_size": 4, "share": Share(0, 2)}
    seen: list[list[list[Position]]] = []
    for how in (BatchingConfig(), BatchingConfig(kind="grouped"), BatchingConfig(kind="packed", max_tokens=400)):
        batches = make_batches(Layout.flat(100), how, known, **common)  # type: ignore[arg-type]
        seen.append(list(batches.stream(0, 3)))
    assert [len(b) for b in seen[0]] == [4, 4, 4] == [len(b) for b in seen[1]]
    assert seen[0] != seen[1]
    assert len({len(b) for b in seen[2]}) > 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "packed"}, "kind=packed and max_tokens=N go together"),
        ({"max_tokens": 10}, "kind=packed and max_tokens=N go together"),
        ({"kind": "plain", "window": 3}, "window belongs to kind grouped, not to plain"),
    ],
)
def test_settings_without_effect_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BatchingConfig(**keys)  # type: ignore[arg-type]
