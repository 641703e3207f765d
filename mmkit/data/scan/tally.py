"""Distributions of whole numbers in flat memory: one count for each value."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Values from here on share one count. Pictures are measured in pixels and KiB, captions in characters: few are longer.
LARGEST = (1 << 16) - 1
_QUANTILES = {"5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95}
# Where the largest value is this many times the smallest, equal steps would put nearly all of them into one bar.
_WIDE = 20


@dataclasses.dataclass
class Tally:
    """How often each value comes.

    Attributes:
        counts: By value, i64[largest value + 1], `LARGEST` at most.
        total: Sum of the values.
        most: The largest, exactly.
    """

    counts: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    total: int = 0
    most: int = 0

    def add(self, values: ArrayLike) -> Tally:
        """Count values, none below 0, i64[N]; returns itself."""
        found = np.asarray(values, dtype=np.int64).ravel()
        if not len(found):
            return self
        counts = np.bincount(np.minimum(found, LARGEST))
        # The largest is not known in advance, so the counts grow with what comes.
        size = max(len(self.counts), len(counts))
        self.counts = np.pad(self.counts, (0, size - len(self.counts))) + np.pad(counts, (0, size - len(counts)))
        self.total += int(found.sum())
        self.most = max(self.most, int(found.max()))
        return self

    @property
    def size(self) -> int:
        """Values counted."""
        return int(self.counts.sum())

    def quantile(self, q: float) -> int:
        """Nearest rank from below; 0 of nothing."""
        if not self.size:
            return 0
        # At least rank 1: the quantile 0 is the smallest value that exists.
        return int(np.searchsorted(np.cumsum(self.counts), max(1, int(np.ceil(q * self.size)))))

    def summary(self) -> dict[str, Any]:
        """``n``, ``least``, quantiles, ``most`` and ``mean``, for a table and for JSON."""
        quantiles = {name: self.quantile(q) for name, q in _QUANTILES.items()}
        mean = round(self.total / self.size, 2) if self.size else 0
        return {"n": self.size, "least": self.quantile(0), **quantiles, "most": self.most, "mean": mean}

    def bars(self, most: int = 32) -> list[tuple[int, int, int]]:
        """A histogram: first value, last value and count of each bar, without gaps."""
        if not self.size:
            return []
        low, high = self.quantile(0), len(self.counts) - 1
        if high - low < most:
            edges = np.arange(low, high + 2)
        elif high > _WIDE * max(1, low):
            # unique: where steps are less than one, rounding gives the same edge twice.
            edges = np.unique(np.geomspace(max(1, low), high + 1, most + 1).round().astype(np.int64))
            # geomspace cannot begin at 0: without this the smallest value would fall out.
            edges[0], edges[-1] = low, high + 1
        else:
            edges = np.unique(np.linspace(low, high + 1, most + 1).round().astype(np.int64))
        counts = np.add.reduceat(np.append(self.counts, 0), edges[:-1])
        return [(int(a), int(b) - 1, int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]
