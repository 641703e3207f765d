"""Token sequences as tensors: a padded row for each, or all in one row (`mmkit.models.packed` keeps them apart)."""

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


def pad_sequences(ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
    """A row for each sequence, filled up on the right to the longest.

    Args:
        ids: Token ids of each sequence, none of them empty.
        labels: Labels of each, aligned with its ids; -100 where nothing is learnt.
        pad: What fills the ids. The mask comes from lengths, so any id will do; padding is never learnt, whichever it is.

    Returns:
        ``input_ids``, ``labels`` and ``attention_mask`` i64[B, T].
    """
    lengths = [len(each) for each in ids]
    rows = torch.full((len(ids), max(lengths)), pad, dtype=torch.int64)
    learnt, mask = torch.full_like(rows, IGNORE_INDEX), torch.zeros_like(rows)
    for i, length in enumerate(lengths):
        # On the right: under causal attention no token looks at what fills its row. By length and not by id: a genuine
        # token may have the id that fills, and LLaVA drops it with the padding (facts/llava.md 1.4).
        rows[i, :length], learnt[i, :length] = torch.tensor(ids[i]), torch.tensor(labels[i])
        mask[i, :length] = 1
    return {"input_ids": rows, "attention_mask": mask, "labels": learnt}
