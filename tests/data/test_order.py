"""Order of samples: permutation, worlds and accumulation, workers, going on, and replacement of bad samples."""

from __future__ import annotations

import os
import pickle
import signal
import time
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.data.batching import EvenBatches, Share
from mmkit.data.layout import Layout
from mmkit.data.loader import Drawn, ReplacingSet, _collate_drawn, explain_worker, make_loader
from mmkit.data.order import Order, Position, make_order
from mmkit.data.skipped import LeftOut, SampleError
from mmkit.errors import InputError


class Numbers:
    """Sample ``i`` is (i, a random number of its own); those in ``bad`` cannot be used."""

    def __init__(self, size: int, bad: frozenset[int] = frozenset()) -> None:
        self.size, self.bad = size, bad

    def __len__(self) -> int:
        return self.size

    def load(self, index: int, rng: np.random.Generator) -> tuple[int, float]:
        if index in self.bad:
            raise SampleError(f"number {index} is bad")
        return index, float(rng.random())

    def describe(self, index: int) -> tuple[str, str]:
        return "numbers", str(index)


def collate(samples: list[tuple[int, float]]) -> dict[str, torch.Tensor]:
    return {"index": torch.tensor([s[0] for s in samples]), "value": torch.tensor([s[1] for s in samples], dtype=torch.float64)}


def batches_of(order: Order, **more: int) -> list[list[Position]]:
    split: dict[str, Any] = {"first_step": 0, "micro_batch_size": 4, "rank": 0, "world_size": 1, **more}
    first, last, share = split.pop("first_step"), split.pop("last_step"), Share(split.pop("rank"), split.pop("world_size"))
    return list(EvenBatches(order, share=share, **split).stream(first, last))


def load_all(
    samples: Numbers, batches: list[list[Position]], workers: int = 0
) -> list[tuple[list[int], list[float], list[LeftOut]]]:
    loader = make_loader(samples, collate, batches, seed=5, workers=workers, pin_memory=False)
    return [(b["index"].tolist(), b["value"].tolist(), left) for b, left in loader]


@settings(deadline=None)
@given(size=st.integers(1, 200), seed=st.integers(0, 2**32), epoch=st.integers(0, 5))
def test_an_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    found = make_order(Layout.flat(size), seed).positions(epoch * size, size)
    assert sorted(p.index for p in found) == list(range(size))
    assert {p.epoch for p in found} == {epoch}


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return [p.index for p in make_order(Layout.flat(50), seed).positions(number * 50, 50)]

    assert epoch(1, 0) == epoch(1, 0)
    assert len({tuple(epoch(seed, number)) for seed in range(3) for number in range(3)}) == 9
    assert epoch(0, 0) != sorted(epoch(0, 0))


@settings(deadline=None)
@given(size=st.integers(1, 40), start=st.integers(0, 200), first=st.integers(0, 30), second=st.integers(0, 30))
def test_positions_join_without_a_gap(size: int, start: int, first: int, second: int) -> None:
    order = make_order(Layout.flat(size), 3)
    joined = order.positions(start, first) + make_order(Layout.flat(size), 3).positions(start + first, second)
    assert joined == order.positions(start, first + second)


@pytest.mark.parametrize("size", [7, 64, 100])
def test_batches_cover_the_epochs_without_gap_or_duplicate(size: int) -> None:
    flat = [p for batch in batches_of(make_order(Layout.flat(size), 0), last_step=3 * size, batch_size=4) for p in batch]
    assert len(flat) == len(set(flat)) == 12 * size
    for epoch in range(12):
        assert sorted(p.index for p in flat[epoch * size : (epoch + 1) * size]) == list(range(size))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_step_is_the_same_for_every_split(world_size: int, micro: int) -> None:
    order = make_order(Layout.flat(37), 1)
    steps = 5
    found: list[list[Position]] = [[] for _ in range(steps)]
    rounds = 16 // (micro * world_size)
    for rank in range(world_size):
        mine = batches_of(order, last_step=steps, batch_size=16, micro_batch_size=micro, rank=rank, world_size=world_size)
        assert len(mine) == steps * rounds
        assert {len(b) for b in mine} == {micro}
        for i, batch in enumerate(mine):
            found[i // rounds] += batch
    for step in range(steps):
        assert len(found[step]) == len(set(found[step])) == 16
        assert set(found[step]) == set(order.positions(step * 16, 16))


def test_micro_batches_interleave_the_ranks() -> None:
    order = make_order(Layout.flat(100), 0)
    whole = order.positions(0, 8)
    for rank in (0, 1):
        mine = batches_of(order, last_step=1, batch_size=8, micro_batch_size=2, rank=rank, world_size=2)
        assert mine == [whole[2 * rank : 2 * rank + 2], whole[4 + 2 * rank : 6 + 2 * rank]]


def test_a_split_that_does_not_fit_is_refused() -> None:
    with pytest.raises(AssertionError, match="micro x accumulation x world"):
        batches_of(make_order(Layout.flat(10), 0), last_step=1, batch_size=8, micro_batch_size=3)


@pytest.mark.parametrize("step", [0, 1, 9, 19])
def test_going_on_at_a_step_is_the_tail_of_the_whole(step: int) -> None:
    samples = Numbers(30, frozenset({3, 4}))
    whole = load_all(samples, batches_of(make_order(Layout.flat(30), 2), last_step=20, batch_size=8))
    tail = load_all(samples, batches_of(make_order(Layout.flat(30), 2), first_step=step, last_step=20, batch_size=8))
    assert tail == whole[step * 2 :]


def test_workers_change_nothing() -> None:
    samples = Numbers(30, frozenset({3, 4, 5}))
    batches = batches_of(make_order(Layout.flat(30), 2), last_step=8, batch_size=8)
    assert load_all(samples, batches, workers=0) == load_all(samples, batches, workers=2)


def test_batches_may_come_from_an_iterator() -> None:
    order = make_order(Layout.flat(30), 2)
    lazy = EvenBatches(order, batch_size=4, micro_batch_size=4, share=Share(0, 1)).stream(0, 10**9)
    loader = make_loader(Numbers(30), collate, lazy, seed=5, workers=0, pin_memory=False)
    found = [b["index"].tolist() for b, _ in islice(loader, 3)]
    assert found == [[p.index for p in b] for b in batches_of(order, last_step=3, batch_size=4)]


def test_augmentation_differs_by_epoch_and_sample_not_by_place() -> None:
    draw = ReplacingSet(Numbers(10), 5)
    values = {(e, i): draw[Position(e, i)].sample[1] for e in range(3) for i in range(10)}
    assert len(set(values.values())) == 30
    assert draw[Position(2, 7)].sample == (7, values[2, 7])
    assert ReplacingSet(Numbers(10), 6)[Position(2, 7)].sample[1] != values[2, 7]


def test_a_bad_sample_is_replaced_the_same_way_and_listed() -> None:
    samples = Numbers(10, frozenset(range(7)))
    first = [ReplacingSet(samples, 5)[Position(0, i)] for i in range(10)]
    assert first == [ReplacingSet(samples, 5)[Position(0, i)] for i in range(10)]
    for i, (sample, left_out) in enumerate(first):
        assert sample[0] in (7, 8, 9)
        assert (left_out == []) == (i >= 7)
        if left_out:
            assert left_out[0] == LeftOut("numbers", str(i), f"number {i} is bad")
    # Neighbours are often bad too: replacements must not all be the next good one.
    assert len({first[i].sample[0] for i in range(7)}) > 1


def test_left_out_samples_come_with_their_batch() -> None:
    samples = Numbers(8, frozenset({2}))
    order = make_order(Layout.flat(8), 0)
    found = load_all(samples, batches_of(order, last_step=2, batch_size=4))
    keys = [s.key for _, _, left in found for s in left]
    assert set(keys) == {"2"}
    assert all(len(index) == 4 and 2 not in index for index, _, _ in found)


@pytest.mark.parametrize("workers", [0, 1])
def test_fifty_bad_samples_in_a_row_stop_the_run(workers: int) -> None:
    samples = Numbers(10, frozenset(range(10)))
    with pytest.raises(SampleError, match="50 samples in a row cannot be used, the last: numbers"):
        load_all(samples, [[Position(0, 0)]], workers=workers)


def test_forty_nine_bad_samples_do_not() -> None:
    class Later(Numbers):
        tries = 0

        def load(self, index: int, rng: np.random.Generator) -> tuple[int, float]:
            self.tries += 1
            if self.tries < ReplacingSet.ATTEMPTS:
                raise SampleError("not yet")
            return index, 0.0

    assert len(ReplacingSet(Later(10), 0)[Position(0, 0)].left_out) == 49


def test_what_goes_to_the_workers_can_be_pickled() -> None:
    # Linux forks today; macOS and Python 3.14 do not.
    draw, merge = pickle.loads(pickle.dumps((ReplacingSet(Numbers(3), 0), _collate_drawn)))
    batch, left = merge(collate, [draw[Position(0, 1)], Drawn((2, 0.5), [LeftOut("a", "b", "c")])])
    assert batch["index"].tolist() == [1, 2]
    assert left == [LeftOut("a", "b", "c")]


class Failing(Numbers):
    """Does something bad at sample 3."""

    def __init__(self, size: int, act: str) -> None:
        super().__init__(size)
        self.act = act

    def load(self, index: int, rng: np.random.Generator) -> tuple[int, float]:
        if index == 3 and self.act == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 3 and self.act == "hang":
            time.sleep(60)
        if index == 3 and self.act == "refuse":
            raise InputError("no package s3fs", where="s3://a", mend="install it")
        return super().load(index, rng)


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        ("hang", SampleError, r"no batch for 1 s \(data.timeout\): a disk or a server does not answer"),
        ("refuse", InputError, r"^s3://a: no package s3fs; install it$"),
    ],
)
def test_a_worker_that_meets_wrong_input_or_hangs_ends_the_run_in_one_line(act: str, kind: type[Exception], message: str) -> None:
    batches = [[Position(0, i)] for i in range(5)]
    loader = make_loader(Failing(8, act), collate, batches, seed=0, workers=1, pin_memory=False, timeout=1, prefetch=1)
    with pytest.raises(kind, match=message) as caught:
        for _ in loader:
            pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("said", ["(pid 12) is killed by signal: Killed. ", "(pid(s) 12) exited unexpectedly"])
def test_a_worker_that_dies_is_told_from_a_bug(said: str) -> None:
    # torch's own words; tests/training/test_data_section.py really kills one.
    found = explain_worker(RuntimeError(f"DataLoader worker {said}"))
    assert str(found).startswith("data.workers: a loader worker died (DataLoader worker (pid")
    assert "use fewer; the same command goes on" in str(found) and "\n" not in str(found)
    assert explain_worker(RuntimeError("shapes do not fit")) is None


def test_a_replacement_is_no_longer_than_what_it_stands_in_for() -> None:
    tokens = np.random.default_rng(0).integers(1, 1000, 500).astype(np.int32)
    bad = frozenset(range(0, 500, 7))
    guarded = ReplacingSet(Numbers(500, bad), 5, None, tokens)
    found = {index: guarded[Position(0, index)].sample[0] for index in range(500)}
    assert all(found[i] == i for i in range(500) if i not in bad)
    # The very shortest have each other, or one of them could have nothing in its place.
    floor = np.sort(tokens)[ReplacingSet.SHORTEST - 1]
    assert all(tokens[found[i]] <= max(tokens[i], floor) for i in bad)
    assert len({found[i] for i in bad}) > 40
    shortest = int(tokens.argmin())
    assert ReplacingSet(Numbers(500, frozenset({shortest})), 5, None, tokens)[Position(0, shortest)].sample[0] != shortest
