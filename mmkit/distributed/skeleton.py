"""ZeRO-3 without a full copy of the model in every process: one process reads the weights, the others hold shapes.

A stage builds its model on the meta device where :attr:`Engine.skeleton` says so. Here it is cut up parameter by parameter:
the process that has the weights hands each one out, every process keeps its piece, and the whole one is freed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def partition(module: nn.Module, settings: dict[str, Any], *, dtype: torch.dtype, device: torch.device) -> None:
    """Cut a model up as ZeRO-3 has it (a collective call), in place; parameters stay the same objects.

    Rank 0 holds all values; elsewhere parameters and buffers may be on the meta device. Beside its pieces a process holds one
    whole parameter at a time.

    Args:
        module: The objective.
        settings: DeepSpeed's.
        dtype: Of the floating-point parameters and buffers that compute.
        device: Where this process computes.
    """
    import deepspeed

    with torch.no_grad():
        # Buffers by hand: DeepSpeed hands out parameters alone.
        for owner in module.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[name] = _handed_out(buffer, dtype, device)
        first: Any = None
        # Tied ones come once, and stay tied: it is the same object.
        for parameter in module.parameters():
            _make_real(parameter, dtype, device)
            if first is None:
                # DeepSpeed converts modules; with one parameter in one it hands it out and cuts it up.
                holder = nn.ParameterList([parameter])
                deepspeed.zero.Init(module=holder, config_dict_or_path=settings, dtype=dtype)
                first = parameter
            else:
                first.convert_to_zero_parameters([parameter])


def collect(parameters: list[nn.Parameter], *, keep: bool) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Put partitioned parameters together in host memory, one after the other (a collective call).

    Args:
        parameters: The same on all processes.
        keep: Whether this process gets them, in place of its pieces.

    Returns:
        Each parameter with what it held before, to be put back.
    """
    import deepspeed

    found = []
    for parameter in parameters:
        with deepspeed.zero.GatheredParameters([parameter]):
            # copy: on a CPU `to` would give DeepSpeed's own memory, which is freed at the end of the block.
            whole = parameter.detach().to("cpu", copy=True) if keep else None
        if whole is not None:
            found.append((parameter, parameter.data, whole))
    # Only when no collective follows: DeepSpeed takes a parameter's data for its own.
    for parameter, _, whole in found:
        parameter.data = whole
    return [(parameter, before) for parameter, before, _ in found]


def _computing(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The type that a tensor is computed with."""
    # Counts and ids stay what they are.
    return dtype if tensor.is_floating_point() else tensor.dtype


def _make_real(parameter: nn.Parameter, dtype: torch.dtype, device: torch.device) -> None:
    """Give a parameter memory on the device; the object stays, since the optimizer holds it."""
    kind = _computing(parameter, dtype)
    if parameter.is_meta:
        # Without values: rank 0's come with the broadcast by which DeepSpeed cuts a parameter up (Init._zero_init_param).
        real = nn.Parameter(torch.empty(parameter.shape, dtype=kind, device=device), requires_grad=parameter.requires_grad)
        # A meta tensor takes no data of another device, so the two change places instead.
        torch.utils.swap_tensors(parameter, real)
    else:
        parameter.data = parameter.data.to(device=device, dtype=kind)


def _handed_out(buffer: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rank 0's buffer, on this process's device."""
    kind = _computing(buffer, dtype)
    real = torch.empty(buffer.shape, dtype=kind, device=device) if buffer.is_meta else buffer.to(device=device, dtype=kind)
    real = real.contiguous()
    torch.distributed.broadcast(real, 0)
    return real
