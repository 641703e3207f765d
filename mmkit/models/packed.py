"""Attention over packed sequences: several documents in one row, each of which sees itself alone.

A dense document mask costs memory and time of the square of the whole row. Here every document is attended by itself: by torch's
variable-length flash attention on a GPU in half precision, else by one call of scaled_dot_product_attention a document. Both are
exact. transformers takes the function in under a name (`IMPLEMENTATION`); without `document_lengths` it does what ``sdpa`` does,
so padded batches and generation go through the same model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mmkit.errors import InputError

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
    document_lengths: Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document.

    Args:
        module: The attention layer (transformers' convention).
        query: f[1, heads, T, width].
        key: f[1, key heads, T, width]; each serves ``heads / key heads`` query heads.
        value: As ``key``.
        attention_mask: Of padded batches; ignored where ``document_lengths`` says which token belongs to which document.
        scaling: Factor on the scores; None: ``width ** -0.5``.
        dropout: Share of the weights that are dropped.
        sliding_window: Tokens that a position sees, itself included; None: all before it.
        document_lengths: Tokens of each of the D documents, together T; None: a padded batch.
        cu_seqlens: i32[D + 1], the same as places on the device: where each begins, and T.
        **kwargs: What else transformers hands on, for padded batches.

    Returns:
        f[1, T, heads, width], and None for the weights.
    """
    if document_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    assert cu_seqlens is not None and len(query) == 1, "packed documents lie in one row"
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        # Rotary positions make queries and keys fp32 under autocast; SDPA would cast them back by itself.
        query, key, value = (part.to(torch.get_autocast_dtype("cuda")) for part in (query, key, value))
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
        return _flash(query, key, value, cu_seqlens, max(document_lengths), scaling, sliding_window), None
    grouped = key.shape[1] != query.shape[1]
    parts = []
    for start, end in pairwise(accumulate(document_lengths, initial=0)):
        length = end - start
        mask = _band(length, sliding_window, query.device) if sliding_window is not None and sliding_window < length else None
        q, k, v = (part[:, :, start:end] for part in (query, key, value))
        parts.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2), None


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

    Raises:
        InputError: It has attention of its own, or something else through which documents would see each other.
    """
    try:
        language_model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
    except ValueError:
        pass
    else:
        if language_model.config._attn_implementation == IMPLEMENTATION and _keeps_apart(language_model.config):  # type: ignore[union-attr]
            return
    kind = language_model.config.model_type  # type: ignore[union-attr]
    raise InputError(f"{kind} models cannot read packed rows", where="batching.kind", mend="use grouped")


def _keeps_apart(config: Any) -> bool:
    """Whether a model of this kind gives for packed documents what it gives for each alone: tried on one with few layers.

    Some models take the name of the attention and do not hand its arguments on (StableLM), or have terms that it does not know.
    """
    config = copy.deepcopy(config)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    # One layer of each kind decides; more would only take memory.
    config.num_hidden_layers = max(1, len(kinds))
    if kinds:
        config.layer_types = kinds
    config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id = 64, None, None, None
    lengths = (3, 5)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        # In the class of its own, with random weights; the name of the attention is in the configuration.
        model = AutoModel.from_config(config, dtype=torch.float32).eval()
        model.set_attn_implementation(IMPLEMENTATION)
        ids = torch.randint(64, (1, sum(lengths)))
        with torch.no_grad():
            packed = model(ids, use_cache=False, **packed_arguments(lengths, ids.device)).last_hidden_state
            alone = [model(part, use_cache=False).last_hidden_state for part in ids.split(lengths, dim=1)]
    return torch.allclose(packed, torch.cat(alone, dim=1), rtol=1e-3, atol=1e-3)


def packed_arguments(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Arguments of a forward pass over one packed row.

    Args:
        lengths: Tokens of each document.
        device: Of the row.

    Returns:
        Positions that begin anew in each document, and what `packed_attention` needs.
    """
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {
        "position_ids": positions.unsqueeze(0).to(device, non_blocking=True),
        # On the host too: to ask the device for them would make it wait in every layer.
        "document_lengths": tuple(lengths),
        "cu_seqlens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True),
        # Four dimensions: transformers then makes no mask of its own, which would be T x T.
        "attention_mask": torch.zeros(1, 1, 1, 1, device=device),
    }
