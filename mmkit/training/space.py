"""What a run will need on the disk, asked before it starts rather than found out after hours."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from torch import nn

from mmkit.config import TrainConfig
from mmkit.errors import InputError
from mmkit.training.checkpoint import list_checkpoints


def checkpoint_size(module: nn.Module) -> int:
    """Bytes of a checkpoint of the objective in any mode: what training changes, and AdamW's two moments of it."""
    # What is frozen comes from the parent again, so it is in no checkpoint.
    changing = sum(p.numel() for p in module.parameters() if p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in module.buffers())
    # All in fp32: DeepSpeed's bf16 weights are made from its fp32 ones.
    return changing * 12 + buffers


def product_size(module: nn.Module) -> int:
    """Bytes of the product: all weights, frozen ones too."""
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def check_space(module: nn.Module, config: TrainConfig, folder: Path, *, start: int, total: int) -> None:
    """Refuse a disk that cannot hold what the run is going to write.

    Args:
        module: The objective, before it is wrapped.
        config: The recipe's train section.
        folder: The run's ``checkpoints``; its parent must exist.
        start: Updates done so far.
        total: Updates of the whole run.

    Raises:
        InputError: Less is free than the checkpoints that will be there at one time and the product need.
    """
    # An estimate, a little low: settings and names are not in it, and they are small.
    each = checkpoint_size(module)
    every = config.checkpoint_every or max(1, total)
    # Rounded up: the last step is saved too, whether it is a multiple or not.
    planned = math.ceil(total / every) - start // every
    if config.early_stopping is not None:
        # Every look may find a better step, which is saved.
        planned = total - start
    # One more than are kept: the oldest goes after the newest is complete. Those that are there have their space already.
    # Early stopping takes one place more and not one for each: a best step is a checkpoint itself, so only the best as of the
    # oldest kept one can be older than all of them.
    kept = config.keep_checkpoints + (config.early_stopping is not None)
    checkpoints = max(0, min(kept + 1 - len(list_checkpoints(folder)), planned))
    need = checkpoints * each + product_size(module)
    # What this user may take, not what the superuser could.
    # The folder itself is made with its first checkpoint.
    free = shutil.disk_usage(folder.parent).free
    if free < need:
        what = f"{checkpoints} checkpoints of {_readable(each)} and the product"
        raise InputError(
            f"{_readable(need)} are needed ({what}), {_readable(free)} are free",
            where=folder.parent,
            mend="free some space, lower train.keep_checkpoints, or use another run=DIR",
        )


def _readable(size: int) -> str:
    """Bytes in the unit that a person would choose."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size = size / 1024  # type: ignore[assignment]
    return f"{size:.1f} GiB"
