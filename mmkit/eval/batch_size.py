"""How many questions are answered together: as many as fit the memory."""

from __future__ import annotations

from typing import Any

import torch

from mmkit.distributed.snapshot import room_for

# Beyond these a step takes longer in proportion: nothing is gained.
_MOST = {"cuda": 256, "cpu": 64}
# Of a GPU's free memory; the rest is for fragments and for what is not counted below.
_SHARE = 0.7
# What the CPU's allocator, CUDA's libraries and older versions of torch say when memory is out.
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


def row_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """Memory of one row while its answer is written: keys and values, what a layer and the last one compute.

    Args:
        config: Of the language model.
        tokens: Prompt and answer.
        itemsize: Bytes of a number.
    """
    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_width = getattr(config, "head_dim", None) or width // heads
    inner = getattr(config, "intermediate_size", None) or 4 * width
    # One layer more: it is copied while it grows.
    kept = 2 * (layers + 1) * key_heads * head_width * tokens * itemsize
    computed = (6 * width + 3 * inner) * tokens * itemsize
    # Scores of the last place in fp32, with a copy.
    return int(kept + computed + 2 * 4 * config.vocab_size)


def fitting(config: Any, tokens: int, *, itemsize: int, beams: int, device: torch.device) -> int:
    """The largest power of two of rows that fits the free memory, 1 if none does.

    Args:
        config: Of the language model.
        tokens: Of the longest prompt with its answer.
        itemsize: Bytes of a number.
        beams: Each is a row of its own.
        device: Where they are computed.
    """
    each = row_bytes(config, tokens, itemsize) * beams
    size = _MOST.get(device.type, _MOST["cpu"])
    while size > 1 and not _room(size * each, device):
        size //= 2
    return size


def _room(size: int, device: torch.device) -> bool:
    """Whether so many bytes are free."""
    if device.type != "cuda":
        return room_for(size)
    free, _ = torch.cuda.mem_get_info(device)
    # What torch holds and does not use is free too.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return size < _SHARE * free


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is out; a smaller batch may help then."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in str(error) for sign in _SIGNS)
