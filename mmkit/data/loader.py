"""The loader that follows an order: samples decoded by worker processes, unusable ones replaced and listed."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from mmkit.data.layout import Layout
from mmkit.data.order import Position
from mmkit.data.skipped import LeftOut, SampleError
from mmkit.errors import InputError

T = TypeVar("T")
# Covariant: a protocol that only hands samples out must take a set of a more special kind.
T_co = TypeVar("T_co", covariant=True)


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
    # From the same shard first, which is at hand; when that one is bad throughout, from all of them.
    NEAR = 10
    # So many of the shortest samples may stand in for each other, or the shortest of all would have none to take its place.
    SHORTEST = 64

    def __init__(
        self, samples: SampleSet[T], seed: int, layout: Layout | None = None, tokens: NDArray[np.int32] | None = None
    ) -> None:
        """Replace by any sample of the same shard; with ``tokens`` i32[samples] by one that is no longer, wherever it is."""
        self.samples = samples
        self.seed = seed
        self._ends = (layout or Layout.flat(len(samples))).ends()
        self._tokens = tokens
        # Stable: equal lengths stand in the same order on every machine, and so does what stands in for a sample.
        self._by_length = None if tokens is None else np.argsort(tokens, kind="stable")

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
                index = self._another(position.index, attempt, rng)
        # The last reason stands for all: it is what a user can start from.
        last = left_out[-1]
        raise SampleError(f"{self.ATTEMPTS} samples in a row cannot be used, the last: {last.source} {last.key}: {last.reason}")

    def _another(self, index: int, attempt: int, rng: np.random.Generator) -> int:
        """A random other sample, not the next one: neighbours of a bad sample are often bad too."""
        if self._by_length is not None and self._tokens is not None:
            # A micro-batch was filled up to a bound with the sample's own length in mind.
            fitting = np.searchsorted(self._tokens, self._tokens[index], side="right", sorter=self._by_length)
            return int(self._by_length[rng.integers(max(int(fitting), min(self.SHORTEST, len(self._by_length))))])
        if attempt >= self.NEAR:
            return int(rng.integers(len(self.samples)))
        chunk = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[chunk - 1]) if chunk else 0
        return first + int(rng.integers(int(self._ends[chunk]) - first))


def make_loader(
    samples: SampleSet[T],
    collate: Callable[[list[T]], dict[str, Any]],
    micro_batches: Sequence[list[Position]] | Iterator[list[Position]],
    *,
    seed: int,
    workers: int,
    pin_memory: bool,
    layout: Layout | None = None,
    prefetch: int = 2,
    timeout: float = 0,
    tokens: NDArray[np.int32] | None = None,
) -> Iterator[tuple[dict[str, Any], list[LeftOut]]]:
    """Batches in exactly the given order, with what was left out to fill them.

    Args:
        samples: The data set.
        collate: Turns a list of samples into a batch of tensors.
        micro_batches: Positions of each batch.
        seed: Seed of the augmentation.
        workers: Loader processes; the result does not depend on it.
        pin_memory: Copy batches to pinned memory for the device.
        layout: Shards of the data set, so that a replacement comes from the same one; None: it has none.
        prefetch: Batches that each worker makes ahead.
        timeout: Seconds to wait for a batch of the workers before the run ends; 0 waits for ever.
        tokens: Lengths i32[samples] that replacements have to keep; None: they have none.

    Raises:
        SampleError: While iterating: the data set is broken, or a worker hangs.
        RuntimeError: At any time: a worker died (`explain_worker`).
        InputError: While iterating, as the data set raises it.
    """
    loader: DataLoader[Any] = DataLoader(
        _Guarded(ReplacingSet(samples, seed, layout, tokens)),
        batch_sampler=_Batches(micro_batches),
        # No closure: where processes are not forked (macOS, Python 3.14), it must pickle.
        collate_fn=functools.partial(_collate_drawn, collate),
        num_workers=workers,
        pin_memory=pin_memory,
        # The iterator is made once for the whole run, so there is nothing to keep workers for.
        persistent_workers=False,
        worker_init_fn=one_thread if workers else None,
        # torch refuses this and a time-out where no worker is.
        prefetch_factor=prefetch if workers else None,
        timeout=timeout if workers else 0,
    )
    return _unguarded(iter(loader), timeout)


class _Guarded(Dataset[Any]):
    """Hands errors about the data over like samples: raised in a worker, they would arrive as a traceback of that process."""

    def __init__(self, samples: ReplacingSet[Any]) -> None:
        self.samples = samples

    # torch asks for a whole batch at once where a data set has this method, so one error can take the batch's place.
    def __getitems__(self, positions: list[Position]) -> list[Drawn[Any]] | Exception:
        try:
            return [self.samples[position] for position in positions]
        except (SampleError, InputError) as error:
            return error


def explain_worker(error: RuntimeError) -> InputError | None:
    """What to tell the user where torch found a loader worker dead; None for any other error.

    torch tells of it from a signal handler, so from wherever the main process was, not only while it waited for a batch.
    """
    if not str(error).startswith("DataLoader worker"):
        return None
    what = f"a loader worker died ({str(error).split('.')[0]})"
    return InputError(what, where="data.workers", mend="if memory ran out, use fewer; the same command goes on")


def _unguarded(batches: Iterator[Any], timeout: float) -> Iterator[tuple[dict[str, Any], list[LeftOut]]]:
    """Batches; what a worker handed over as an error is raised here."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            # torch's own words for a worker that gives no batch.
            if "DataLoader timed out" in str(error):
                raise SampleError(f"no batch for {timeout:.0f} s (data.timeout): a disk or a server does not answer") from None
            raise
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _collate_drawn(
    collate: Callable[[list[T]], dict[str, Any]], drawn: list[Drawn[T]] | Exception
) -> tuple[dict[str, Any], list[LeftOut]] | Exception:
    """The batch, and what was left out to fill it."""
    if isinstance(drawn, Exception):
        return drawn
    return collate([d.sample for d in drawn]), [s for d in drawn for s in d.left_out]


class _Batches(torch.utils.data.Sampler[list[Position]]):
    """Hands the given batches to the DataLoader."""

    def __init__(self, batches: Sequence[list[Position]] | Iterator[list[Position]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Position]]:
        return iter(self.batches)


def one_thread(worker: int) -> None:
    """Loader workers leave the cores to each other, and signals to the main process.

    A signal to the process group must reach the loop, which writes a checkpoint; a worker that died of it would end the run.
    """
    # Each worker would start a thread for every core.
    torch.set_num_threads(1)
    # SIGTERM itself stays: it is how torch ends a worker. In a group of its own a worker does not get its parent's.
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
