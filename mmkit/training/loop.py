"""The one training loop. Stages differ in their recipe and their objective, never here."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator

import torch

from mmkit.config import TrainConfig
from mmkit.data.batching import Batches, Share, make_batches
from mmkit.data.layout import Layout
from mmkit.data.loader import make_loader
from mmkit.data.skipped import LeftOut, SampleError
from mmkit.distributed.engine import Engine
from mmkit.distributed.preemption import Preemption
from mmkit.errors import InputError, StoppedError
from mmkit.run import Run
from mmkit.training.best import Best
from mmkit.training.checkpoint import Saver, load_newest, newest_step, put_aside_unsound
from mmkit.training.objective import Batch, Stage, to_device
from mmkit.training.optim import lr_scale, make_optimizer, parameter_groups, warmup_steps
from mmkit.training.space import check_space
from mmkit.training.step_log import Launched, LoopSettings, Readback, StepLog, batch_digest, sum_sizes
from mmkit.training.track import Tracker

logger = logging.getLogger(__name__)


def total_steps(config: TrainConfig, samples: int) -> int:
    """Updates of the run: given, or from samples or epochs (rounded up to whole batches)."""
    if config.steps is not None:
        return config.steps
    seen = config.samples if config.samples is not None else (config.epochs or 0) * samples
    # Rounded up: the samples that the recipe asks for are all seen, and the last batch goes on into the next epoch.
    return math.ceil(seen / config.batch_size)


def train(
    stage: Stage,
    engine: Engine,
    run: Run,
    config: TrainConfig,
    settings: LoopSettings,
    tracker: Callable[[int], Tracker] | None = None,
    preemption: Preemption | None = None,
) -> None:
    """Train a stage to the end, from the newest checkpoint if the run has one.

    The end is the last step, or with ``train.early_stopping`` the step at which patience has run out; the objective then has the
    weights of the best step.

    A step: read its micro-batches, count what is supervised over all ranks, forward and backward with the global count, check
    that loss and gradient are finite, update. On a GPU the host never waits for the device within a step: what it has to know
    of a step (loss, faults, a signal anywhere) it reads while the next one runs. DeepSpeed is the exception: it hands its
    gradient norm to the host in every step. Checkpoints are written in the background; the one after the last step is complete
    when this returns, so that nothing is lost while the product is being saved.

    Args:
        stage: Objective, data and product writer.
        engine: Processes and precision.
        run: Where metrics and checkpoints go.
        config: The recipe's train section.
        settings: Seed, loader workers, limits.
        tracker: Opens the place where curves and pictures go besides, from the step the run goes on from; main process only.
        preemption: Where signals are noted; None notes them while this runs.

    Raises:
        StoppedError: A signal came; a checkpoint is written.
        InputError: Too many unreadable samples, loss or gradient not finite, no space for checkpoints, or none that is sound.
    """
    objective = stage.objective
    total = total_steps(config, len(stage.samples))
    warmup = warmup_steps(config.warmup, total)
    start = _begin(stage, engine, run, config, total)
    plan = make_batches(
        stage.layout or Layout.flat(len(stage.samples)),
        stage.batching,
        stage.lengths,
        seed=settings.seed,
        steps=total,
        batch_size=config.batch_size,
        micro_batch_size=engine.micro_batch_size,
        share=Share(engine.rank, engine.world_size),
    )
    batches = _loader(stage, engine, settings, plan, start, total)
    best = Best(config.early_stopping, engine, run, every=_look_every(stage, config))
    # `best.protected` is asked anew at each save: which step is the best changes while the run lasts.
    saver = Saver(engine, run.checkpoints, keep=config.keep_checkpoints, protected=best.protected)
    opened = tracker(start) if tracker is not None else None
    log = StepLog(stage, engine, run, config, settings, opened, saver=saver, start=start, total=total)
    readback = Readback(engine.device)
    objective.train()
    checkpoint_every = config.checkpoint_every or max(1, total)

    # Closed however the run ends: a tracker that is not keeps its last rows to itself, a checkpoint may be half written.
    with preemption or Preemption() as preemption, contextlib.closing(log), contextlib.closing(saver):
        for step in range(start, total):
            # Asked before a step and not after it: a run that was killed while its product was saved comes here too.
            if best.over:
                break
            # Dropout and the like: the same numbers at this step whatever happened before it.
            # No two of (seed, step, rank) share a number below a million steps and 4,096 ranks.
            torch.manual_seed((settings.seed * 1_000_003 + step) * 4096 + engine.rank)
            began = time.monotonic()
            micro, left_out = _read_step(batches, plan.rounds(step))
            waited = time.monotonic() - began
            # On the host's copy of the batch: counting on the device would mean to wait for it.
            counted = sum(objective.count(b) for b in micro)
            keys = [str(k) for b in micro for k in b.get("keys", [])]
            sizes = sum_sizes(objective.sizes(b) for b in micro)
            micro = [to_device(b, engine.device) for b in micro]
            # float64 holds any token count exactly, and one tensor means one collective a step before the forward.
            signals = bool(preemption.requested)
            facts = engine.sum(engine.numbers(counted, len(left_out), signals, saver.failed, batch_digest(keys), *sizes))
            # After the other sum and not before it: collectives of a group run in order, so this one has the forward pass to
            # run beside, and nothing waits behind it.
            statistics = objective.statistics(micro)
            if statistics is not None:
                objective.absorb(engine.sum_later(statistics))
            with engine.autocast():
                objective.prepare(micro)
            # Summed on the device: a Python number would have to wait for each micro-batch.
            loss_sum = torch.zeros((), device=engine.device)
            for i, batch in enumerate(micro):
                loss_sum += engine.forward_backward(batch, count=facts[0], last=i == len(micro) - 1)
            # Over all ranks, for the log and the check: the gradient has its own sum in backward.
            loss = engine.sum(loss_sum) / facts[0].clamp(min=1)
            norm = engine.gradient_norm()
            scale = lr_scale(step, total=total, schedule=config.schedule, warmup_steps=warmup, min_ratio=config.min_lr_ratio)
            # Stays on the device: `update` takes it as a switch, the host hears of it later.
            broken = ~loss.isfinite() if norm is None else ~(loss + norm).isfinite()
            deepspeed_norm = engine.update(scale, broken=broken)
            values = torch.stack([loss.double(), (deepspeed_norm if norm is None else norm).double(), *facts])
            readback.push(values, Launched(step + 1, scale, waited, keys, left_out))

            done = step + 1
            ends = done == total or done % checkpoint_every == 0
            looks = done == total or any(done % every == 0 for every in _look_every(stage, config))
            # One step stays in flight on a GPU; before the weights are saved or looked at, all must be known to be sound.
            # A list, and sum instead of any: any of a generator would end at the first signal and leave later steps unlogged.
            stopping = bool(sum([log.step(*read) for read in readback.ready(everything=ends or looks)]))
            # The step still in flight too: the checkpoint holds it, so no later start would log it.
            if stopping and done < total:
                stopping = any([stopping, *(log.step(*read) for read in readback.ready(everything=True))])
            # The best so far may become the product; from the last step a run goes on that is killed while it saves that.
            keeps = looks and best.take(done, log.looks(done), last=done == total)
            if stopping or ends or keeps or best.over:
                saver.save(done)
            if stopping and done < total:
                # Complete before the exit code promises that the same command goes on.
                saver.wait()
                raise StoppedError(f"stopped by a signal after step {done} of {total}; run the same command to go on")
        saver.wait()
        best.restore()
        run.note(saves={name: round(value, 3) for name, value in saver.totals.items()})


def _begin(stage: Stage, engine: Engine, run: Run, config: TrainConfig, total: int) -> int:
    """Make the optimiser, hand both over to the engine, and go on from the newest sound checkpoint; updates done so far.

    Raises:
        InputError: No space for checkpoints, or none that is sound.
    """
    objective = stage.objective
    # Before the optimiser is made: it must hold the parameters where they stay.
    engine.place(objective)
    groups = parameter_groups(
        objective.named_parameters(),
        lr=config.lr,
        weight_decay=config.weight_decay,
        lr_of=stage.lr_of,
        undecayed=stage.undecayed,
    )
    optimizer = make_optimizer(groups, betas=config.betas, eps=config.eps, device=engine.device)
    # Before wrapping: DDP and DeepSpeed then see the compiled parts as they are.
    if config.compile:
        objective.compile_parts()
    aside = put_aside_unsound(engine, run.checkpoints)
    if aside:
        run.note(checkpoints_set_aside=aside)
    engine.on_main(lambda: check_space(objective, config, run.checkpoints, start=newest_step(run.checkpoints), total=total))
    engine.prepare(objective, optimizer)
    start = load_newest(engine, run.checkpoints)
    # Rows of steps that will be made again.
    run.drop_metrics_after(start)
    if start:
        logger.info("going on from the checkpoint at step %d of %d", start, total)
    return start


def _look_every(stage: Stage, config: TrainConfig) -> list[int]:
    """After how many steps something looks at the model."""
    found = [monitor.every for monitor in stage.monitors]
    return [*found, config.val_every] if stage.validation is not None and config.val_every else found


def _loader(
    stage: Stage, engine: Engine, settings: LoopSettings, plan: Batches, start: int, total: int
) -> Iterator[tuple[Batch, list[LeftOut]]]:
    """This rank's micro-batches from step ``start`` on."""
    return make_loader(
        stage.samples,
        stage.collate,
        plan.stream(start, total),
        seed=settings.seed,
        workers=settings.workers,
        pin_memory=engine.device.type == "cuda",
        layout=stage.layout,
        prefetch=settings.prefetch,
        timeout=settings.timeout,
        # Packed micro-batches alone are filled up to a bound on tokens, which a replacement must not exceed.
        tokens=stage.lengths.tokens if stage.lengths is not None and stage.batching.kind == "packed" else None,
    )


def _read_step(batches: Iterator[tuple[Batch, list[LeftOut]]], rounds: int) -> tuple[list[Batch], list[LeftOut]]:
    """The micro-batches of one step, and what had to be left out to fill them."""
    try:
        read = [next(batches) for _ in range(rounds)]
    except SampleError as error:
        raise InputError(str(error), where="data.train", mend="repair or remove the samples") from None
    return [batch for batch, _ in read], [s for _, left in read for s in left]
