"""Data order as a pure function of (seed, epoch, position).

Nothing here depends on the number of loader workers or on what happened before: to go on at step ``k`` is to ask for step ``k``.
A step has the next ``batch_size`` positions, whatever the world size; `mmkit.data.batching` says which rank takes which. An epoch
permutes the shards and shuffles the samples within windows of them, so asking for any position costs one window, whatever the
size of the data set.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmkit.data.layout import Layout, Part

# Draws between which the shares of a mixture hold exactly.
_BLOCK = 10_000
Ints = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Position:
    """One draw: which epoch, and which sample of the data set."""

    epoch: int
    index: int


class Order(ABC):
    """A run reads positions 0, 1, 2, ... through the epochs without a gap."""

    @abstractmethod
    def positions(self, start: int, count: int) -> list[Position]:
        """Samples at global positions ``start`` to ``start + count - 1``."""


class _Epoch(NamedTuple):
    """The plan of one epoch: shards in their order i64[C], first shard i64[W + 1] and first sample i64[W + 1] of each window."""

    shards: Ints
    first_shard: Ints
    first_sample: Ints


class ShuffledOrder(Order):
    """Epochs of one source: shards permuted, samples shuffled within windows of shards."""

    def __init__(self, part: Part, seed: int) -> None:
        assert part.size > 0 and part.chunks.min() > 0, "an order needs at least one sample, and no shard without"
        self.part, self.size, self.seed = part, part.size, seed
        self._starts = np.cumsum(part.chunks) - part.chunks
        # Two: a batch may straddle two epochs or windows, and drawing a permutation anew for every position would cost O(size).
        self._epoch = functools.lru_cache(maxsize=2)(self._plan)
        self._window = functools.lru_cache(maxsize=2)(self._shuffle)

    def _plan(self, epoch: int) -> _Epoch:
        """The windows of an epoch."""
        count, window = len(self.part.chunks), self.part.window
        if window is None or window >= self.size:
            # All in one window, where the order of the shards would be shuffled away.
            return _Epoch(np.arange(count), np.asarray([0, count]), np.asarray([0, self.size]))
        # Its own generator: the order must not move when a model or a library draws one number more from a global one.
        shards = np.random.default_rng([self.seed, epoch]).permutation(count)
        ends = np.cumsum(self.part.chunks[shards])
        # A shard belongs to the window that its first sample falls into: whole shards, and no window without any.
        number = (ends - self.part.chunks[shards]) // window
        first_shard = np.concatenate([[0], np.flatnonzero(np.diff(number)) + 1, [count]])
        return _Epoch(shards, first_shard, np.concatenate([[0], ends[first_shard[1:] - 1]]))

    def _shuffle(self, epoch: int, window: int) -> Ints:
        """Indices of the samples of a window, shuffled: i64[samples]."""
        plan = self._epoch(epoch)
        shards = plan.shards[plan.first_shard[window] : plan.first_shard[window + 1]]
        # The order that sets had before there were windows, so that figures of small sets do not move (LOG.md).
        if len(plan.first_shard) == 2:
            return np.random.default_rng([self.seed, epoch]).permutation(self.size)
        # Written out without a loop: each shard's numbers are its start and what follows it.
        sizes = self.part.chunks[shards]
        offsets = self._starts[shards] - (np.cumsum(sizes) - sizes)
        indices = np.repeat(offsets, sizes) + np.arange(int(sizes.sum()))
        # From 1 on: a seed that ends in 0 is the one without it, which permutes the shards.
        np.random.default_rng([self.seed, epoch, window + 1]).shuffle(indices)
        return indices

    def positions(self, start: int, count: int) -> list[Position]:
        """Samples at global positions ``start`` to ``start + count - 1``."""
        found: list[Position] = []
        while count:
            # Without a gap: the last batch of an epoch is filled from the next one, so none is short and none is dropped.
            epoch, place = divmod(start, self.size)
            first = self._epoch(epoch).first_sample
            window = int(np.searchsorted(first, place, side="right")) - 1
            inside = place - int(first[window])
            indices = self._window(epoch, window)[inside : inside + count].tolist()
            found += [Position(epoch, index) for index in indices]
            start, count = start + len(indices), count - len(indices)
        return found


class MixedOrder(Order):
    """Draws from several sources by weight, each of which goes through epochs of its own.

    Every 10,000 draws hold each source's share exactly, in random order: no source runs ahead, and a position is found
    without looking at those before it.
    """

    def __init__(self, parts: tuple[Part, ...], seed: int) -> None:
        self.seed = seed
        self.orders = [ShuffledOrder(part, _seed_of(seed, i)) for i, part in enumerate(parts)]
        self._offsets = np.cumsum([0, *(part.size for part in parts)])
        self._counts = shares([part.weight or 0.0 for part in parts])
        self._block = functools.lru_cache(maxsize=2)(self._draw)

    def _draw(self, block: int) -> tuple[Ints, Ints]:
        """For each draw of a block its source, and how many draws of that source came before in the block: i64[10,000] each."""
        chosen = np.random.default_rng([self.seed, block]).permutation(np.repeat(np.arange(len(self._counts)), self._counts))
        rank = np.zeros(_BLOCK, dtype=np.int64)
        for source, count in enumerate(self._counts):
            rank[chosen == source] = np.arange(count)
        return chosen, rank

    def positions(self, start: int, count: int) -> list[Position]:
        """Samples at global positions ``start`` to ``start + count - 1``."""
        found = []
        for p in range(start, start + count):
            block, place = divmod(p, _BLOCK)
            chosen, rank = self._block(block)
            source = int(chosen[place])
            # Every block takes equally many draws of a source, so those of earlier blocks need no counting.
            drawn = self.orders[source].positions(block * int(self._counts[source]) + int(rank[place]), 1)[0]
            found.append(Position(drawn.epoch, drawn.index + int(self._offsets[source])))
        return found


def make_order(layout: Layout, seed: int) -> Order:
    """The order of a data set."""
    if len(layout.parts) > 1:
        return MixedOrder(layout.parts, seed)
    return ShuffledOrder(layout.parts[0], seed)


def shares(weights: list[float]) -> Ints:
    """Draws of each source among 10,000, in proportion to positive weights (largest remainders): i64[sources]."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * _BLOCK
    counts = np.floor(exact).astype(np.int64)
    # Stable: of equal remainders the first source's is taken, on every machine.
    for source in np.argsort(-(exact - counts), kind="stable")[: _BLOCK - int(counts.sum())]:
        counts[source] += 1
    return counts


def _seed_of(seed: int, part: int) -> int:
    """A seed of its own for each source, or equal sizes would mean equal permutations."""
    # Counted from 1. Another number would be another order, in which no earlier run could go on.
    state: NDArray[Any] = np.random.SeedSequence([seed, part + 1]).generate_state(2, np.uint32)
    return int(state[0]) << 32 | int(state[1])
