"""Which samples go through the model together: the global batch of a step, cut into the micro-batches of one process.

The order says which samples a step has; nothing here changes that, but for `GroupedOrder`, which is an order itself. So however a
step is cut, over however many processes, its update is the same: the loss is a sum divided by the count of the whole step.
"""

from __future__ import annotations

import functools
import heapq
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmkit.config import BatchingConfig
from mmkit.data.layout import Layout
from mmkit.data.order import Order, Position, make_order
from mmkit.errors import InputError

# Global batches: long enough that a batch finds its like, short enough that a position costs little.
WINDOW = 64


class Lengths(NamedTuple):
    """What each sample of a data set costs.

    Attributes:
        tokens: i32[samples], tokens of its sequence, image tokens included.
        text_only: bool[samples], whether it has no picture.
    """

    tokens: NDArray[np.int32]
    text_only: NDArray[np.bool_]

    @classmethod
    def of(cls, tokens: Sequence[int]) -> Lengths:
        """Lengths of samples that all have a picture, or all have none."""
        return cls(np.asarray(tokens, dtype=np.int32), np.zeros(len(tokens), dtype=bool))


class Share(NamedTuple):
    """Which process this is, of how many."""

    rank: int
    world_size: int


class Batches(ABC):
    """The micro-batches of one process, a pure function of the step."""

    @abstractmethod
    def step(self, step: int) -> list[list[Position]]:
        """This process's micro-batches of a step; equally many on every process, none of them empty."""

    def rounds(self, step: int) -> int:
        """Micro-batches of a step on each process."""
        return len(self.step(step))

    def stream(self, first: int, last: int) -> Iterator[list[Position]]:
        """The micro-batches of steps ``first`` to ``last - 1``, one after the other."""
        # Lazily: a long run's positions are millions, and a worker needs a few batches ahead.
        for step in range(first, last):
            yield from self.step(step)


class EvenBatches(Batches):
    """Micro-batches of equally many samples: global batch = micro-batch x accumulation x world size."""

    def __init__(self, order: Order, *, batch_size: int, micro_batch_size: int, share: Share) -> None:
        self.order, self.batch_size, self.micro_batch_size, self.share = order, batch_size, micro_batch_size, share
        self._rounds, rest = divmod(batch_size, micro_batch_size * share.world_size)
        assert not rest and self._rounds, "global batch = micro x accumulation x world"

    def step(self, step: int) -> list[list[Position]]:
        """Micro-batch ``a`` of rank ``r`` is slice ``a * world_size + r`` of the global batch."""
        # Ranks interleave within a round: with twice the ranks and half the rounds the same micro-batches exist.
        slices = range(self.share.rank, self._rounds * self.share.world_size, self.share.world_size)
        begin = step * self.batch_size
        return [self.order.positions(begin + n * self.micro_batch_size, self.micro_batch_size) for n in slices]

    def rounds(self, step: int) -> int:
        """The accumulation, the same in every step."""
        return self._rounds


class PackedBatches(Batches):
    """Micro-batches of at most so many tokens, for models that read several samples as one sequence without padding.

    A sample that cannot be used is replaced by one that is no longer (`mmkit.data.loader.ReplacingSet`), so the bound holds.

    A step's samples are dealt to as few micro-batches as hold them, the longest first and each to the emptiest, so that processes
    have about equal work (longest processing time first; Graham 1969). Their number differs from step to step.
    """

    def __init__(self, order: Order, lengths: Lengths, *, batch_size: int, max_tokens: int, share: Share) -> None:
        """Set the global batch in samples and the bound on the tokens of a micro-batch.

        Raises:
            InputError: The longest sample is longer than the bound, or the batch has no sample for some process.
        """
        # Refused here: one sample over the bound, and `_deal` would add rounds for ever.
        longest = int(lengths.tokens.max())
        if longest > max_tokens:
            raise InputError(
                f"the longest sample has {longest} tokens, a micro-batch at most {max_tokens}",
                where="batching.max_tokens",
                mend=f"use {longest} or more, or a smaller max_length",
            )
        # With a multiple, one sample for each micro-batch is always a solution; without, one process could be left with none.
        if batch_size % share.world_size:
            raise InputError(
                f"global batch {batch_size} is no multiple of world size {share.world_size}",
                where="train.batch_size",
                mend="change train.batch_size or the number of processes",
            )
        self.order, self.tokens, self.share = order, lengths.tokens, share
        self.batch_size, self.max_tokens = batch_size, max_tokens
        # The loop asks for a step's rounds after the loader asked for its samples, some steps ahead.
        self._plan = functools.lru_cache(maxsize=64)(self._deal)

    def step(self, step: int) -> list[list[Position]]:
        """Of each round of equally heavy micro-batches this process's one."""
        return self._plan(step)[self.share.rank :: self.share.world_size]

    def rounds(self, step: int) -> int:
        """Rounds of this step."""
        return len(self._plan(step)) // self.share.world_size

    def _deal(self, step: int) -> list[list[Position]]:
        """All micro-batches of all processes, the heaviest first; neighbours are of about equal weight."""
        positions = self.order.positions(step * self.batch_size, self.batch_size)
        sizes = self.tokens[[p.index for p in positions]].tolist()
        world = self.share.world_size
        # The fewest that the sum allows. Dealing may need more, for samples are not cut. Whole rounds, since all
        # processes must make equally many forward passes, or they would wait for each other for ever.
        rounds = max(1, -(-sum(sizes) // (self.max_tokens * world)))
        while True:
            bins = deal(sizes, rounds * world)
            if max(sum(sizes[i] for i in members) for members in bins) <= self.max_tokens:
                break
            rounds += 1
        # Neighbours are the micro-batches of one round: of about equal weight, or all would wait for the heaviest.
        bins.sort(key=lambda members: -sum(sizes[i] for i in members))
        # In the order of the step within each: which sample is the longest is no matter of the model's.
        return [[positions[i] for i in sorted(members)] for members in bins]


def deal(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Deal numbered things to ``count`` bins of about equal weight, none of them empty.

    Args:
        sizes: Weights, at least ``count`` of them.
        count: Bins.

    Returns:
        Indices into ``sizes`` for each bin.
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    # Stable, and ties by the number of the bin: the same on every process.
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        weight, number = heapq.heappop(heap)
        bins[number].append(index)
        # At least 1: a thing without weight still fills its bin.
        heapq.heappush(heap, (weight + max(1, sizes[index]), number))
    return bins


class GroupedOrder(Order):
    """Global batches of samples of about equal length and of one modality, in random order (LLaVA's group_by_modality_length).

    Windows of whole batches of another order are sorted by (text only, length), cut into batches, and the batches shuffled: a
    position is found without looking beyond its window. Windows end with the epoch and with the run, so the samples that are
    drawn, and how often, are those of the other order; a batch over two epochs stays as it was. Of the first window the batch
    with the longest samples comes first, so that memory runs out at once rather than late (prismatic-vlms' idea).
    """

    def __init__(
        self,
        order: Order,
        lengths: Lengths,
        *,
        batch_size: int,
        steps: int,
        epoch: int | None,
        seed: int,
        window: int = WINDOW,
    ) -> None:
        """Sort within ``window`` batches at a time.

        Args:
            order: Which samples come.
            lengths: Of all samples.
            batch_size: Samples of a global batch.
            steps: Batches of the whole run.
            epoch: Samples of an epoch; None: the order has none (a mixture by weight).
            seed: Of the batches' order.
            window: Batches.
        """
        self.order, self.lengths, self.batch_size, self.seed = order, lengths, batch_size, seed
        self.steps, self.epoch, self.window = steps, epoch, window
        self._sorted = functools.lru_cache(maxsize=2)(self._sort)

    def _span(self, batch: int) -> tuple[int, int]:
        """First and last batch, the latter not included, of the window of a batch."""
        if batch >= self.steps:
            return batch, batch + 1
        first, end = 0, self.steps
        if self.epoch is not None:
            # Of the batch's first sample: one that lies over the end still counts to the epoch that it begins in.
            number = batch * self.batch_size // self.epoch
            # Rounded up: the batch over the beginning is the last of the epoch before.
            first = -(-number * self.epoch // self.batch_size)
            # Rounded down: the batch over the end belongs to no window.
            whole = (number + 1) * self.epoch // self.batch_size
            if batch >= whole:
                return batch, batch + 1
            end = min(end, whole)
        begin = first + (batch - first) // self.window * self.window
        return begin, min(begin + self.window, end)

    def _sort(self, begin: int, end: int) -> list[Position]:
        """The positions of batches ``begin`` to ``end - 1``, regrouped."""
        drawn = self.order.positions(begin * self.batch_size, (end - begin) * self.batch_size)
        # Nothing to group: as it was drawn.
        if end - begin == 1:
            return drawn
        index = np.asarray([p.index for p in drawn])
        # lexsort: the last key is the first to count. Stable, so ties stay in the random order that they came in.
        ranked = np.lexsort((self.lengths.tokens[index], self.lengths.text_only[index])).reshape(-1, self.batch_size)
        # By the window and not by a run of draws: no window's order depends on those before it.
        batches = np.random.default_rng([self.seed, begin]).permutation(len(ranked))
        if begin == 0:
            heaviest = int(self.lengths.tokens[index[ranked]].max(axis=1).argmax())
            batches = np.concatenate([[heaviest], batches[batches != heaviest]])
        return [drawn[i] for i in ranked[batches].ravel()]

    def positions(self, start: int, count: int) -> list[Position]:
        """Samples at global positions ``start`` to ``start + count - 1``."""
        found: list[Position] = []
        while count:
            begin, end = self._span(start // self.batch_size)
            place = start - begin * self.batch_size
            part = self._sorted(begin, end)[place : place + count]
            found += part
            start, count = start + len(part), count - len(part)
        return found


def make_batches(
    layout: Layout,
    how: BatchingConfig,
    lengths: Lengths | None,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    micro_batch_size: int,
    share: Share,
) -> Batches:
    """The micro-batches of one process.

    Args:
        layout: Of the data set.
        how: The recipe's choice.
        lengths: Of all samples; needed but for plain batches.
        seed: Of the order.
        steps: Of the whole run.
        batch_size: Samples of a step, over all processes.
        micro_batch_size: Samples of a forward pass; packed batches have a bound on tokens instead.
        share: Which process this is.

    Raises:
        InputError: A bound that cannot be kept.
    """
    order = make_order(layout, seed)
    if how.kind == "plain":
        return EvenBatches(order, batch_size=batch_size, micro_batch_size=micro_batch_size, share=share)
    assert lengths is not None and len(lengths.tokens) == layout.size, f"{how.kind} batches need the length of every sample"
    if how.kind == "grouped":
        # Of a mixture by weight each source goes through epochs of its own, so a window ends with the run alone.
        epoch = layout.size if len(layout.parts) == 1 else None
        grouped = GroupedOrder(
            order, lengths, batch_size=batch_size, steps=steps, epoch=epoch, seed=seed, window=how.window or WINDOW
        )
        return EvenBatches(grouped, batch_size=batch_size, micro_batch_size=micro_batch_size, share=share)
    assert how.max_tokens is not None
    return PackedBatches(order, lengths, batch_size=batch_size, max_tokens=how.max_tokens, share=share)
