"""How a data set is cut: shards, shuffle windows and mixture weights; all that an order has to know of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of a data set.

    Attributes:
        chunks: Samples of each shard, i64[C], none of them 0.
        window: Samples within which an epoch is shuffled, rounded up to whole shards; None: all of them.
        weight: Share of the draws among all parts; None: parts are read one epoch each.
    """

    chunks: NDArray[np.int64]
    window: int | None = None
    weight: float | None = None

    @property
    def size(self) -> int:
        """Samples of the part."""
        return int(self.chunks.sum())


@dataclasses.dataclass(frozen=True)
class Layout:
    """The parts of a data set; its samples are numbered through them in order."""

    parts: tuple[Part, ...]

    @classmethod
    def flat(cls, size: int) -> Layout:
        """One shard of ``size`` samples, shuffled as a whole."""
        return cls((Part(np.asarray([size], dtype=np.int64)),))

    @property
    def size(self) -> int:
        """Samples of all parts."""
        return sum(part.size for part in self.parts)

    def keep(self, kept: NDArray[np.bool_]) -> Layout:
        """The layout of some of the samples, bool[size], when they are all in memory: weights stay, windows are not needed."""
        ends = np.cumsum([part.size for part in self.parts])
        counts = [int(np.count_nonzero(block)) for block in np.split(kept, ends[:-1])]
        # A part of which nothing is left has no order (`mmkit.data.order`); the weights of the others are relative.
        found = [(part, n) for part, n in zip(self.parts, counts, strict=True) if n]
        return Layout(tuple(Part(np.asarray([n], dtype=np.int64), None, part.weight) for part, n in found))

    def ends(self) -> NDArray[np.int64]:
        """First index after each shard, i64[C]."""
        return np.cumsum(np.concatenate([part.chunks for part in self.parts]))


def join(layouts: Sequence[Layout], weights: Sequence[float | None]) -> Layout:
    """One layout of several data sets: with weights a part each, without them shards of one part.

    Args:
        layouts: Of single sources.
        weights: Shares of the draws, for all of them or for none.
    """
    assert len(layouts) == len(weights)
    found = [part for layout in layouts for part in layout.parts]
    # For all or for none: the recipe's schema refuses anything between. Each keeps its own window, since it goes
    # through epochs of its own.
    if weights[0] is not None:
        return Layout(tuple(Part(p.chunks, p.window, w) for p, w in zip(found, weights, strict=True)))
    windows = [part.window for part in found if part.window is not None]
    # Such sources (single files, mapped tables) give any sample at once, so all are shuffled as a whole.
    if not windows:
        return Layout((Part(np.concatenate([part.chunks for part in found])),))
    # The smallest: it is there because some source cannot hold more at one time.
    window = min(windows)
    # A source that is one piece would be read in one go somewhere in the epoch; in pieces it mixes with the others' shards.
    piece = max(1, window // 10)
    chunks = [part.chunks if part.window is not None else _cut(part.size, piece) for part in found]
    return Layout((Part(np.concatenate(chunks), window),))


def _cut(size: int, piece: int) -> NDArray[np.int64]:
    """Pieces of a source: i64[C] that sum to its size."""
    whole, rest = divmod(size, piece)
    return np.asarray([piece] * whole + [rest] * bool(rest), dtype=np.int64)
