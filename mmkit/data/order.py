"""Data order as a pure function of (seed, epoch, position), and the loader that follows it.

Nothing here depends on the number of loader workers or on what happened before: to go on at step ``k`` is to ask for step ``k``.
The global batch of a step is the same for every world size; a rank takes its share of it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmkit.data.skipped import LeftOut, SampleError

T = TypeVar("T")
# Covariant: a protocol that only hands samples out must take a set of a more special kind.
T_co = TypeVar("T_co", covariant=True)


@dataclasses.dataclass(frozen=True)
class Position:
    """One draw: which epoch, and which sample of the data set."""

    epoch: int
    index: int


class Order:
    """Seeded permutation of each epoch; a run reads positions 0, 1, 2, ... through the epochs without a gap."""

    def __init__(self, size: int, seed: int) -> None:
        assert size > 0, "an order needs at least one sample"
        self.size = size
        self.seed = seed
        # Two: a batch may straddle two epochs, and drawing a permutation anew for every position would cost O(size) each.
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        # Its own generator: the order must not move when a model or a library draws one number more from a global one.
        return np.random.default_rng([self.seed, epoch]).permutation(self.size)

    def positions(self, start: int, count: int) -> list[Position]:
        """Samples at global positions ``start`` to ``start + count - 1``."""
        found = []
        for p in range(start, start + count):
            # Without a gap: the last batch of an epoch is filled from the next one, so none is short and none is dropped.
            epoch, place = divmod(p, self.size)
            found.append(Position(epoch, int(self._permutation(epoch)[place])))
        return found

    def micro_batches(
        self, *, first_step: int, last_step: int, batch_size: int, micro_batch_size: int, rank: int, world_size: int
    ) -> Iterator[list[Position]]:
        """The micro-batches of one rank for steps ``first_step`` to ``last_step - 1``.

        Micro-batch ``a`` of rank ``r`` is slice ``a * world_size + r`` of the global batch, so the set of samples in a step
        does not depend on how it is split.
        """
        rounds = batch_size // (micro_batch_size * world_size)
        assert rounds * micro_batch_size * world_size == batch_size, "global batch = micro x accumulation x world"
        # Lazily: a long run's positions are millions, and a worker needs a few batches ahead.
        for step in range(first_step, last_step):
            for a in range(rounds):
                # Ranks interleave within a round: with twice the ranks and half the rounds the same micro-batches exist.
                offset = (a * world_size + rank) * micro_batch_size
                yield self.positions(step * batch_size + offset, micro_batch_size)


class SampleSet(Protocol[T_co]):
    """What a stage trains on: samples by position, with their own random numbers."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def load(self, index: int, rng: np.random.Generator) -> T_co:
        """Sample ``index``; ``rng`` drives its augmentation. Raises SampleError when it cannot be used."""
        ...

    def describe(self, index: int) -> tuple[str, str]:
        """Source and key of sample ``index`` for the list of left-out samples."""
        ...


class Drawn(NamedTuple, Generic[T]):
    """A sample that was loaded, and what had to be left out to get one."""

    sample: T
    left_out: list[LeftOut]


class ReplacingSet(Dataset[Drawn[T]]):
    """Replaces a sample that cannot be used by another one, deterministically, and says so."""

    # At a tenth of unreadable samples 50 misses in a row do not happen by chance; then something else is broken.
    ATTEMPTS = 50

    def __init__(self, samples: SampleSet[T], seed: int) -> None:
        self.samples = samples
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: Position) -> Drawn[T]:
        """The sample at a position, or its replacement.

        Raises:
            SampleError: No usable sample in 50 attempts: the data set is broken.
        """
        epoch, index = position.epoch, position.index
        left_out: list[LeftOut] = []
        for attempt in range(self.ATTEMPTS):
            # Keyed by the sample and not by the worker or its place in the batch, so that neither changes a crop.
            rng = np.random.default_rng([self.seed, epoch, position.index, attempt])
            try:
                return Drawn(self.samples.load(index, rng), left_out)
            except SampleError as error:
                source, key = self.samples.describe(index)
                left_out.append(LeftOut(source, key, str(error)))
                # A random other sample, not the next one: neighbours of a bad shard are often bad too.
                index = int(rng.integers(len(self.samples)))
        # The last reason stands for all: it is what a user can start from.
        last = left_out[-1]
        raise SampleError(f"{self.ATTEMPTS} samples in a row cannot be used, the last: {last.source} {last.key}: {last.reason}")


def make_loader(
    samples: SampleSet[T],
    collate: Callable[[list[T]], dict[str, Any]],
    micro_batches: Sequence[list[Position]] | Iterator[list[Position]],
    *,
    seed: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[tuple[dict[str, Any], list[LeftOut]]]:
    """Batches in exactly the given order, with what was left out to fill them.

    Args:
        samples: The data set.
        collate: Turns a list of samples into a batch of tensors.
        micro_batches: Positions of each batch.
        seed: Seed of the augmentation.
        workers: Loader processes; the result does not depend on it.
        pin_memory: Copy batches to pinned memory for the device.
    """
    loader: DataLoader[Any] = DataLoader(
        ReplacingSet(samples, seed),
        batch_sampler=_Batches(micro_batches),
        # No closure: where processes are not forked (macOS, Python 3.14), it must pickle.
        collate_fn=functools.partial(_collate_drawn, collate),
        num_workers=workers,
        pin_memory=pin_memory,
        # The iterator is made once for the whole run, so there is nothing to keep workers for.
        persistent_workers=False,
        worker_init_fn=_one_thread if workers else None,
    )
    return iter(loader)


def _collate_drawn(collate: Callable[[list[T]], dict[str, Any]], drawn: list[Drawn[T]]) -> tuple[dict[str, Any], list[LeftOut]]:
    """The batch, and what was left out to fill it."""
    return collate([d.sample for d in drawn]), [s for d in drawn for s in d.left_out]


class _Batches(torch.utils.data.Sampler[list[Position]]):
    """Hands the given batches to the DataLoader."""

    def __init__(self, batches: Sequence[list[Position]] | Iterator[list[Position]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Position]]:
        return iter(self.batches)


def _one_thread(worker: int) -> None:
    """Loader workers leave the cores to each other, and signals to the main process.

    A signal to the process group must reach the loop, which writes a checkpoint; a worker that died of it would end the run.
    """
    # Each worker would start a thread for every core.
    torch.set_num_threads(1)
    # SIGTERM itself stays: it is how torch ends a worker. In a group of its own a worker does not get its parent's.
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
