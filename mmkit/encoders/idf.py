"""Inverse document frequency of the labels, counted in whole numbers while training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkit.encoders.ragged import first_in_row, row_of_label


class OnlineIDF(nn.Module):
    """Document counts of everything seen so far, and the weights that follow from them.

    ``w_c = ln((N + 1) / (df_c + 1))`` with N captions seen and df_c of them containing c. This is x-cls/superclass'
    ``log((n + 1/Bg) / (cap_fq_c + 1/Bg))`` (open_clip/loss.py:441-447) with counts instead of running means; the paper
    (arXiv 2411.03313, section 3.2) writes ``log(N / (1 + df_c))``. A label in every caption weighs 0, none weighs less.

    A row without labels is no document: it counts neither in df nor in N, as it does not count in the loss.

    The counts are int64 buffers: exact in any order of summation, so 1 x 8 processes equal 8 x 1, and untouched by
    ``.to(torch.bfloat16)``. Nothing here knows of ranks: sum `counts` over them, then `absorb` the sum.
    """

    df: Tensor
    n: Tensor

    def __init__(self, vocab_size: int) -> None:
        """Start with nothing seen: all weights 0."""
        super().__init__()
        self.vocab_size = vocab_size
        # Buffers, so that they travel with state_dict and the IDF survives a resume.
        self.register_buffer("df", torch.zeros(vocab_size, dtype=torch.int64))
        self.register_buffer("n", torch.zeros(1, dtype=torch.int64))

    def counts(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Count one local batch without changing the state.

        Args:
            ids: i64[L] labels; repeats in a row count once.
            offsets: i64[B + 1].

        Returns:
            int64[V + 1]: rows that contain each label, then the number of rows that have labels.
        """
        rows = row_of_label(offsets, ids.numel())
        # scatter_add and not bincount: no host synchronisation on CUDA, and exact for integers in any order.
        counted = ids.new_zeros(self.vocab_size + 1)
        counted[: self.vocab_size].scatter_add_(0, ids, first_in_row(ids, rows, self.vocab_size).long())
        counted[-1] = (offsets.diff() > 0).sum()
        return counted

    @torch.no_grad()
    def absorb(self, counts: Tensor) -> None:
        """Add counts (of one batch, or summed over ranks) to the state.

        Args:
            counts: int64[V + 1] from `counts`.
        """
        assert counts.shape == (self.vocab_size + 1,), f"counts {tuple(counts.shape)} for {self.vocab_size} labels"
        counts = counts.to(self.df.device)
        self.df += counts[:-1]
        self.n += counts[-1:]

    def update(self, ids: Tensor, offsets: Tensor) -> None:
        """Count one global batch: ids i64[L], offsets i64[B + 1]."""
        self.absorb(self.counts(ids, offsets))

    def weights(self) -> Tensor:
        """The weights now: float32[V], computed in float64, never negative."""
        # float64: differences of counts beyond 2^24 samples are lost in float32 (x-cls keeps float64 too).
        return torch.log((self.n.double() + 1.0) / (self.df.double() + 1.0)).float()


def row_normalised(weights: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """Weights of ragged labels that sum to 1 in every row.

    As the reference's K-hot matrix, labels are sets: repeats of an id in a row get 0. A row whose weights sum to 0 (all
    its labels are in every caption seen so far) keeps zeros and adds nothing to the loss, as ``F.normalize(p=1)`` leaves
    it (open_clip/loss.py:437).

    Args:
        weights: float[V], not negative.
        ids: i64[L].
        offsets: i64[B + 1].

    Returns:
        float32[L].
    """
    # Collate functions leave the offsets on the CPU where other code wants them; the work is where the ids are.
    offsets = offsets.to(ids.device)
    rows = row_of_label(offsets, ids.numel())
    raw = weights.float()[ids] * first_in_row(ids, rows, weights.numel())
    sums = raw.new_zeros(offsets.numel() - 1).index_add_(0, rows, raw)
    return raw / sums[rows].clamp_min(1e-12)
