"""Validation loss and what the objective counts beside it."""

from __future__ import annotations

import math

import torch

from mmkit.config import TrainConfig
from mmkit.data.loader import make_loader
from mmkit.data.order import Position
from mmkit.data.skipped import LeftOut
from mmkit.distributed.engine import Engine
from mmkit.training.objective import Stage, to_device


@torch.no_grad()
def validate(
    stage: Stage, engine: Engine, config: TrainConfig, seed: int, workers: int = 0, *, prefetch: int = 2, timeout: float = 0
) -> tuple[dict[str, float], list[LeftOut]]:
    """Validation loss over the first ``val_batches`` batches of the validation set, in groups that the ranks take in turn.

    A loss that compares the pictures of a group (CLIP) depends on the group's size, so a stage may fix it; then the result is
    the same for every number of processes and every micro-batch.

    Returns:
        ``{"val_loss": ..., "val_...": ...}``, sums over all ranks divided by the global count; and the samples that this rank
        had to replace by others.
    """
    assert stage.validation is not None
    # The caller puts it back into training mode, after all looks at this step.
    stage.objective.eval()
    # Always the same first samples, so that two rows of a curve differ by the weights alone.
    size = min(len(stage.validation), config.val_batches * config.batch_size)
    each = stage.validation_group or engine.micro_batch_size
    groups = [range(first, min(first + each, size)) for first in range(0, size, each)]
    # Every rank runs the same number of forward passes, or ZeRO-3's gathers would wait for each other for ever: a rank that has
    # fewer groups sees a picture again, which does not count.
    passes = math.ceil(len(groups) / engine.world_size)
    mine = groups[engine.rank :: engine.world_size]
    # Epoch 0 at every look: what a sample draws, and what replaces one that cannot be read, depend on (seed, epoch, index).
    shares = [[Position(0, i) for i in mine[n]] if n < len(mine) else [] for n in range(passes)]
    batches = make_loader(
        stage.validation,
        stage.collate,
        [share or [Position(0, 0)] for share in shares],
        seed=seed,
        workers=workers,
        pin_memory=False,
        prefetch=prefetch,
        timeout=timeout,
    )
    sums: dict[str, float] = {}
    count = 0
    left_out: list[LeftOut] = []
    for share, (batch, unusable) in zip(shares, batches, strict=True):
        left_out += unusable
        count += stage.objective.count(batch) if share else 0
        batch = to_device(batch, engine.device)
        # The objective and not the engine's wrapper: no gradient is exchanged, and ZeRO-3's hooks sit on the modules inside.
        with engine.autocast():
            found = {"loss": float(stage.objective(batch)), **stage.objective.evaluate(batch)}
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + (value if share else 0.0)
    names = sorted(sums)
    # One collective for all names, which are sorted so that every rank sends the same thing in each place.
    # float64: from 2**24 on float32 cannot count single tokens.
    totals = engine.sum(torch.tensor([*(sums[n] for n in names), count], dtype=torch.float64, device=engine.device))
    # A set in which nothing is supervised gives 0 and no NaN, as a step of training does.
    numbers = {f"val_{n}": float(totals[i] / totals[-1].clamp(min=1)) for i, n in enumerate(names)}
    return numbers, left_out
