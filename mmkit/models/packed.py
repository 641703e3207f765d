"""Attention over packed sequences: several documents in one row, each of which sees itself alone.

A dense document mask costs memory and time of the square of the whole row. Here every document is attended by itself: by torch's
variable-length flash attention on a GPU in half precision, else by one call of scaled_dot_product_attention a document. Both are
exact. transformers takes the function in under a name (`IMPLEMENTATION`); without `cu_seqlens` it does what ``sdpa`` does, so
padded batches and generation go through the same model.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

IMPLEMENTATION = "mmkit_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document.

    Args:
        module: The attention layer (transformers' convention).
        query: f[1, heads, T, width].
        key: f[1, key heads, T, width]; each serves ``heads / key heads`` query heads.
        value: As ``key``.
        attention_mask: Of padded batches; ignored where ``cu_seqlens`` says which token belongs to which document.
        scaling: Factor on the scores; None: ``width ** -0.5``.
        dropout: Share of the weights that are dropped.
        sliding_window: Tokens that a position sees, itself included; None: all before it.
        cu_seqlens: i32[D + 1], where the D documents begin, and T; None: a padded batch.
        max_seqlen: Tokens of the longest document.
        **kwargs: What else transformers hands on, for padded batches.

    Returns:
        f[1, T, heads, width], and None for the weights.
    """
    if cu_seqlens is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    assert max_seqlen is not None and len(query) == 1, "packed documents lie in one row"
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
        return _flash(query, key, value, cu_seqlens, max_seqlen, scaling, sliding_window), None
    grouped = key.shape[1] != query.shape[1]
    parts = []
    for start, end in _spans(cu_seqlens):
        length = end - start
        mask = _band(length, sliding_window, query.device) if sliding_window is not None and sliding_window < length else None
        q, k, v = (part[:, :, start:end] for part in (query, key, value))
        parts.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _spans(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """First and last position of each document."""
    ends = cu_seqlens.tolist()
    return list(pairwise(ends))


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """bool[length, length]: which positions a sliding window shows to each."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scaling: float | None, window: int | None
) -> Tensor:
    """Torch's variable-length flash attention: f[1, T, heads, width]."""
    # Imported here: the module asks for a flash kernel, which a CPU build has not.
    from torch.nn.attention.varlen import varlen_attn

    heads = query.shape[1] // key.shape[1]
    # One row: f[T, heads, width].
    q, k, v = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    if heads > 1:
        # Repeated rather than grouped: not every version of the function knows grouped heads.
        k, v = k.repeat_interleave(heads, dim=1), v.repeat_interleave(heads, dim=1)
    size = (-1, 0) if window is None else (window - 1, 0)
    found: Any = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scaling, window_size=size)
    result: Tensor = found
    return result.unsqueeze(0)


AttentionInterface.register(IMPLEMENTATION, packed_attention)
# Padded batches need sdpa's masks under this name too; a packed one brings a mask of four dimensions, which is passed through.
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def allow_packing(language_model: nn.Module) -> None:
    """Have a language model attend by `packed_attention`.

    Args:
        language_model: A transformers model whose attention is one of its named functions.
    """
    language_model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]


def packed_arguments(cu_seqlens: Tensor, max_seqlen: int) -> dict[str, Any]:
    """Arguments of a forward pass over one packed row.

    Args:
        cu_seqlens: i32[D + 1].
        max_seqlen: Tokens of the longest document.

    Returns:
        Positions that begin anew in each document, and what `packed_attention` needs.
    """
    total = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    starts = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff().long())
    return {
        "position_ids": (total - starts).unsqueeze(0),
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max_seqlen,
        # Four dimensions: transformers then makes no mask of its own, which would be T x T.
        "attention_mask": torch.zeros(1, 1, 1, 1, device=cu_seqlens.device),
    }
