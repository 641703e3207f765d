"""Ragged rows of label ids in CSR form: ``ids`` i64[L] end to end, row i is ``ids[offsets[i]:offsets[i + 1]]``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pack_labels(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Join rows of ids.

    Args:
        rows: B rows of any length, empty ones included.

    Returns:
        ids i64[L] and offsets i64[B + 1].
    """
    # count is known, so numpy allocates once.
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    # fromiter over a chain: no list of all ids, which takes most of the time of torch.tensor([...]).
    ids = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int64, count=int(offsets[-1]))
    return torch.from_numpy(ids), torch.from_numpy(offsets)


def row_of_label(offsets: Tensor, total: int) -> Tensor:
    """The row each label belongs to.

    Args:
        offsets: i64[B + 1].
        total: L. Passed because reading it from `offsets` would make the host wait for the device.

    Returns:
        i64[L].
    """
    rows = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=total)


def first_in_row(ids: Tensor, rows: Tensor, vocab_size: int) -> Tensor:
    """Mark the first of equal ids in a row, so that repeats can be left out (labels are sets).

    Args:
        ids: i64[L], each below `vocab_size`.
        rows: i64[L], see `row_of_label`.
        vocab_size: V.

    Returns:
        bool[L]; no host synchronisation.
    """
    # Equal pairs (row, id) become neighbours; stable, so the first in the row stays first.
    keys, order = torch.sort(rows * vocab_size + ids, stable=True)
    first = torch.ones_like(keys, dtype=torch.bool)
    # After sorting, a repeat follows its twin.
    first[1:] = keys[1:] != keys[:-1]
    return torch.empty_like(first).scatter_(0, order, first)
