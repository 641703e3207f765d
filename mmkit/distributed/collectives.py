"""Collectives with a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AllGather(torch.autograd.Function):
    """Rows of all processes; in backward every process gets the summed gradient of its own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """float[B, E] on each of W processes to float[W * B, E] on all."""
        gathered = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        # torch's own gives tensors without a graph, hence this function. Collectives want dense memory.
        torch.distributed.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """float[W * B, E] to float[B, E]."""
        world = torch.distributed.get_world_size()
        # It may come as an expanded view, as that of a plain sum does.
        gradient = gradient.contiguous()
        own = gradient.new_empty((len(gradient) // world, *gradient.shape[1:]))
        torch.distributed.reduce_scatter_tensor(own, gradient)
        return own
