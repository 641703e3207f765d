"""AdamW groups and the learning-rate schedule, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    lr_of: dict[str, float] | None = None,
    undecayed: tuple[str, ...] = (),
) -> list[dict[str, object]]:
    """Trainable parameters in groups by weight decay and learning rate.

    Vectors and scalars (biases, norms) are not decayed (open_clip main.py; superclass.md section 2).

    Args:
        named: ``(name, parameter)``; frozen ones are left out.
        lr: Base learning rate.
        weight_decay: Of matrices and tables.
        lr_of: Other learning rates by name prefix.
        undecayed: Ends of names of tables that are not decayed either.

    Returns:
        Groups for ``torch.optim.AdamW``, each with its ``base_lr``.
    """
    # Keyed by both numbers, so that there are as few groups as there are different settings: each is a kernel of its own.
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        # Frozen weights need no place in the optimiser, nor in DeepSpeed's partitions of its state.
        if not parameter.requires_grad:
            continue
        # Prefixes in the order given: a stage puts the longer ones first.
        rate = next((v for prefix, v in (lr_of or {}).items() if name.startswith(prefix)), lr)
        decay = weight_decay if parameter.ndim >= 2 and not name.endswith(undecayed) else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    # Twice: `lr` is overwritten before every update (Engine.update), `base_lr` stays what the schedule is a factor of.
    return [{"params": p, "lr": rate, "base_lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]


def make_optimizer(
    groups: list[dict[str, object]], *, betas: tuple[float, float], eps: float, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW, fused where the device has it (one kernel instead of one a tensor; on the CPU too)."""
    # Also because the fused one alone takes `found_inf`, by which Engine.update leaves out a broken step without asking the host.
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=device.type in ("cuda", "cpu"))


def lr_scale(step: int, *, total: int, schedule: str, warmup_steps: int, min_ratio: float = 0.0) -> float:
    """Factor on every base learning rate at update ``step`` (0-based).

    Args:
        step: Updates done so far.
        total: Updates of the whole run.
        schedule: ``cosine`` (half a period to ``min_ratio``), ``linear`` or ``constant``, after warm-up.
        warmup_steps: Linear warm-up from ``1 / warmup_steps``.
        min_ratio: Factor at the end.

    Returns:
        A factor in ``[0, 1]``.
    """
    # Never 0: the first update would be lost, and its batch with it.
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    # Beyond the end the last value holds; a schedule that turned up again would undo the annealing.
    progress = min(1.0, (step - warmup_steps) / max(1, total - warmup_steps))
    if schedule == "cosine":
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return min_ratio + (1 - min_ratio) * (1 - progress)
    return 1.0


def warmup_steps(warmup: float, total: int) -> int:
    """Steps of warm-up: a share of the run when below 1."""
    # 1 or more is a number of steps, as recipes of the reference have it; 0.03 is LLaVA's way of saying it.
    return math.ceil(warmup * total) if warmup < 1 else int(warmup)
