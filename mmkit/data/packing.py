"""Several sequences in one row: no padding, and a note of where each begins (`mmkit.models.packed` keeps them apart)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmkit.data.conversations import IGNORE_INDEX


def pack_sequences(ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Lay sequences end to end.

    Args:
        ids: Token ids of each sequence, none of them empty.
        labels: Labels of each, aligned with its ids (not shifted); -100 where nothing is learnt.

    Returns:
        ``input_ids`` and ``labels`` i64[1, T], ``document_lengths`` (tokens of each). The first label of each sequence is -100:
        only the sequence before it could predict it.
    """
    lengths = [len(each) for each in ids]
    assert min(lengths) > 0, "an empty sequence has no place in a row"
    return {
        "input_ids": torch.tensor([[token for each in ids for token in each]], dtype=torch.int64),
        "labels": torch.tensor([[label for each in labels for label in [IGNORE_INDEX, *each[1:]]]], dtype=torch.int64),
        "document_lengths": lengths,
    }
