"""The one training loop. Stages differ in their recipe and their objective, never here."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from mmkit.config import TrainConfig
from mmkit.data.order import Order, Position, make_loader
from mmkit.data.skipped import LeftOut, SampleError
from mmkit.distributed.engine import Engine
from mmkit.distributed.preemption import Preemption
from mmkit.errors import InputError, StoppedError
from mmkit.run import Run
from mmkit.training.checkpoint import load_newest, save_checkpoint
from mmkit.training.objective import Batch, Stage, to_device
from mmkit.training.optim import lr_scale, make_optimizer, parameter_groups, warmup_steps
from mmkit.training.progress import ProgressLine

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """What the loop needs besides the train section of the recipe."""

    seed: int
    workers: int
    max_skipped: float
    title: str


def total_steps(config: TrainConfig, samples: int) -> int:
    """Updates of the run: given, or from samples or epochs (rounded up to whole batches)."""
    if config.steps is not None:
        return config.steps
    seen = config.samples if config.samples is not None else (config.epochs or 0) * samples
    return math.ceil(seen / config.batch_size)


def train(stage: Stage, engine: Engine, run: Run, config: TrainConfig, settings: LoopSettings) -> None:
    """Train a stage to the end, from the newest checkpoint if the run has one.

    A step: read its micro-batches, count what is supervised over all ranks, forward and backward with the global count, check
    that loss and gradient are finite, update.

    Args:
        stage: Objective, data and product writer.
        engine: Processes and precision.
        run: Where metrics and checkpoints go.
        config: The recipe's train section.
        settings: Seed, loader workers, limits.

    Raises:
        StoppedError: A signal came; a checkpoint is written.
        InputError: Too many unreadable samples, or loss or gradient not finite.
    """
    objective = stage.objective.to(engine.device)
    total = total_steps(config, len(stage.samples))
    warmup = warmup_steps(config.warmup, total)
    groups = parameter_groups(objective.named_parameters(), lr=config.lr, weight_decay=config.weight_decay, lr_of=stage.lr_of)
    optimizer = make_optimizer(groups, betas=config.betas, eps=config.eps, device=engine.device)
    if config.compile:
        objective.compile()
    engine.prepare(objective, optimizer)
    start = load_newest(engine, run.checkpoints)
    run.drop_metrics_after(start)
    if start:
        logger.info("going on from the checkpoint at step %d of %d", start, total)
    batches = _batches(stage, engine, config, settings, start, total)
    progress = ProgressLine(settings.title, total, start=start, show=engine.is_main)
    objective.train()
    checkpoint_every = config.checkpoint_every or max(1, total)
    window, waited = time.monotonic(), 0.0

    with Preemption() as preemption:
        for step in range(start, total):
            # Dropout and the like: the same numbers at this step whatever happened before it.
            torch.manual_seed((settings.seed * 1_000_003 + step) * 4096 + engine.rank)
            began = time.monotonic()
            micro, left_out = _read_step(batches, engine.accumulation)
            waited += time.monotonic() - began
            micro = [to_device(b, engine.device) for b in micro]
            _absorb_statistics(stage, engine, micro)
            local_count = sum(objective.count(b) for b in micro)
            # float64 holds any token count exactly, and one tensor means one collective a step before the forward.
            facts = torch.tensor([local_count, len(left_out), bool(preemption.requested)], dtype=torch.float64)
            count, skipped, stop = engine.sum(facts.to(engine.device))
            loss_sum = torch.zeros((), device=engine.device)
            for i, batch in enumerate(micro):
                loss_sum += engine.forward_backward(batch, count=count, last=i == len(micro) - 1)
            loss = float(engine.sum(loss_sum) / count.clamp(min=1))
            norm = engine.gradient_norm()
            _check_finite(loss, norm, step, micro)
            scale = lr_scale(step, total=total, schedule=config.schedule, warmup_steps=warmup, min_ratio=config.min_lr_ratio)
            deepspeed_norm = engine.update(scale)
            if norm is None:  # DeepSpeed knows it only now; broken weights must at least not become a checkpoint
                _check_finite(loss, deepspeed_norm, step, micro)
            if skipped:  # the same on every rank, so all of them gather
                run.skip(engine.gather(left_out))
                size = len(stage.samples) + len(stage.left_out)
                check_skipped(run.skipped, size, settings.max_skipped, where=run.path / "skipped.jsonl")

            done = step + 1
            if done % config.log_every == 0 or done == total:
                now = time.monotonic()
                steps = done - max(start, (done - 1) // config.log_every * config.log_every)
                row = {
                    "step": done,
                    "samples": done * config.batch_size,
                    "loss": loss,
                    "lr": config.lr * scale,
                    "grad_norm": float(norm if norm is not None else deepspeed_norm),
                    "samples_per_second": steps * config.batch_size / max(now - window, 1e-9),
                    "data_wait": waited / max(now - window, 1e-9),
                    "memory_gib": _memory_gib(engine.device),
                    "seconds": now - window,
                }
                run.log(row)
                progress.update(done, row)
                window, waited = now, 0.0
            if stage.validation is not None and config.val_every and (done % config.val_every == 0 or done == total):
                run.log({"step": done, **validate(stage, engine, config, settings)})
                objective.train()
            stopping = bool(stop) and done < total
            if stopping or (done % checkpoint_every == 0 and done < total):
                save_checkpoint(engine, run.checkpoints, done, keep=config.keep_checkpoints)
            if stopping:
                progress.close()
                raise StoppedError(f"stopped by a signal after step {done} of {total}; run the same command to go on")
    progress.close()


def _batches(
    stage: Stage, engine: Engine, config: TrainConfig, settings: LoopSettings, start: int, total: int
) -> Iterator[tuple[Batch, list[LeftOut]]]:
    """This rank's micro-batches from step ``start`` on."""
    order = Order(len(stage.samples), settings.seed)
    micro_batches = order.micro_batches(
        first_step=start,
        last_step=total,
        batch_size=config.batch_size,
        micro_batch_size=engine.micro_batch_size,
        rank=engine.rank,
        world_size=engine.world_size,
    )
    return make_loader(
        stage.samples,
        stage.collate,
        micro_batches,
        seed=settings.seed,
        workers=settings.workers,
        pin_memory=engine.device.type == "cuda",
    )


def _read_step(batches: Iterator[tuple[Batch, list[LeftOut]]], accumulation: int) -> tuple[list[Batch], list[LeftOut]]:
    """The micro-batches of one step, and what had to be left out to fill them."""
    try:
        read = [next(batches) for _ in range(accumulation)]
    except SampleError as error:
        raise InputError(str(error), where="data.train", mend="repair or remove the samples") from None
    return [batch for batch, _ in read], [s for _, left in read for s in left]


def _absorb_statistics(stage: Stage, engine: Engine, micro: list[Batch]) -> None:
    """Sum the objective's counts over ranks, so that every process holds the statistics of the global batch."""
    statistics = stage.objective.statistics(micro)
    if statistics is not None:
        stage.objective.absorb(engine.sum(statistics))


def _check_finite(loss: float, norm: torch.Tensor | None, step: int, micro: list[Batch]) -> None:
    """Stop before the update rather than train on with broken weights."""
    broken = "loss" if not math.isfinite(loss) else "gradient norm" if norm is not None and not math.isfinite(float(norm)) else ""
    if broken:
        keys = [str(k) for b in micro for k in b.get("keys", [])]
        raise InputError(
            f"{broken} is not finite at step {step + 1} (samples: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})",
            mend="lower train.lr, set train.clip_grad_norm, or look at these samples",
        )


def check_skipped(skipped: int, size: int, limit: float, *, where: object) -> None:
    """Refuse a data set of which too much is unusable.

    Raises:
        InputError: More than ``limit`` of ``size`` samples were left out.
    """
    if skipped > max(1.0, limit * size):
        raise InputError(
            f"{skipped} of {size} samples cannot be used, over the limit of {limit:.2%}",
            where=where,
            mend="look at the reasons there; repair the data or raise data.max_skipped",
        )


def _memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the GPU's allocator, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@torch.no_grad()
def validate(stage: Stage, engine: Engine, config: TrainConfig, settings: LoopSettings) -> dict[str, Any]:
    """Validation loss over the first ``val_batches`` batches of the validation set, every rank a share.

    Returns:
        ``{"val_loss": ..., "val_...": ...}``, sums over all ranks divided by the global count.
    """
    assert stage.validation is not None
    stage.objective.eval()
    size = min(len(stage.validation), config.val_batches * config.batch_size)
    mine = [Position(0, i) for i in range(engine.rank, size, engine.world_size)]
    step = engine.micro_batch_size
    # Every rank runs the same number of forward passes, or ZeRO-3's gathers would wait for each other for ever: a rank that has
    # fewer samples sees a batch again, which does not count.
    passes = math.ceil(math.ceil(size / engine.world_size) / step)
    shares = [mine[i * step : (i + 1) * step] for i in range(passes)]
    batches = make_loader(
        stage.validation,
        stage.collate,
        [share or [Position(0, 0)] for share in shares],
        seed=settings.seed,
        workers=0,
        pin_memory=False,
    )
    sums: dict[str, float] = {}
    count = 0
    for share, (batch, _) in zip(shares, batches, strict=True):
        batch = to_device(batch, engine.device)
        with engine.autocast():
            found = {"loss": float(stage.objective(batch)), **stage.objective.evaluate(batch)}
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + (value if share else 0.0)
        count += stage.objective.count(batch) if share else 0
    names = sorted(sums)
    totals = engine.sum(torch.tensor([*(sums[n] for n in names), count], dtype=torch.float64, device=engine.device))
    return {f"val_{n}": float(totals[i] / totals[-1].clamp(min=1)) for i, n in enumerate(names)}
