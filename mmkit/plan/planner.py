"""From a recipe and a number of GPUs to memory, steps and GPU-hours, before any are spent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from mmkit.config import (
    ContrastiveRecipe,
    EvalRecipe,
    LlavaRecipe,
    PretrainRecipe,
    ProbeRecipe,
    Recipe,
    TrainConfig,
    TrainRecipe,
    check_recipe,
)
from mmkit.errors import InputError
from mmkit.plan.figures import Lengths, Machine, Memory, Plan, Work
from mmkit.plan.hardware import GIB, Gpu, find_gpu
from mmkit.plan.samples import count
from mmkit.plan.states import Sharding, Sizes, states
from mmkit.plan.subjects import Subject, make_subject
from mmkit.plan.trace import Trace
from mmkit.recipes import find_deepspeed
from mmkit.training.loop import total_steps

# What neither weights nor activations are: CUDA's context and NCCL's buffers (about a GiB with cuBLAS's workspace), and what the
# allocator loses in pieces too small to use. A margin, not a measurement.
RESERVE_BYTES = GIB
RESERVE_SHARE = 0.05


# Kept for the process: a trace of a 7B model takes seconds, and neither the number of GPUs nor the ZeRO stage changes it.
_TRACES: dict[tuple[str, int, int], Trace] = {}


class Planner:
    """A recipe on a machine."""

    def __init__(
        self, recipe: TrainRecipe, name: str, machine: Machine, *, encoder: str | None = None, lengths: Lengths | None = None
    ) -> None:
        """Build what the recipe trains.

        Args:
            recipe: Of a training stage.
            name: For the plan's head.
            machine: The GPUs.
            encoder: Stands in for an encoder that is not on this machine.
            lengths: Of sequences; what is 0 is taken from the recipe's limit.

        Raises:
            InputError: A part of unknown shape, or a batch that does not divide among the GPUs.
        """
        self.recipe, self.name, self.machine, self.encoder = recipe, name, machine, encoder
        config: TrainConfig = recipe.train
        # Samples of a step on each GPU.
        self.share, rest = divmod(config.batch_size, machine.gpus)
        if rest or not self.share:
            raise InputError(
                f"global batch {config.batch_size} does not divide among {machine.gpus} GPUs",
                where="train.batch_size",
                mend=f"use {_nearest_divisor(config.batch_size, machine.gpus)} GPUs, or plan with another train.batch_size",
            )
        self.sharding = Sharding.of(find_deepspeed(config.deepspeed) if config.deepspeed else None)
        self.subject: Subject = make_subject(recipe, encoder=encoder)
        # DeepSpeed casts the whole objective; otherwise weights stay fp32 under autocast.
        cast = self.sharding.stage is not None and config.precision == "bf16"
        self.subject.place(torch.bfloat16 if cast else None)
        self.autocast = config.precision == "bf16" and not cast
        given = lengths or Lengths()
        longest = given.longest or self.subject.longest
        self.lengths = Lengths(min(given.mean or longest, longest), longest)
        if self.subject.given >= longest > 0:
            raise InputError(
                f"{longest} tokens have no room for a picture's {self.subject.given}",
                where="--longest",
                mend="give the length with image tokens",
            )
        # After the cast: bytes are those of the dtype that computes.
        sizes = Sizes.of(self.subject.objective, persistent=self.sharding.persistent)
        self.sizes = sizes.with_quantised(self.subject.quantised)
        self._key = f"{_shape_keys(recipe)} {cast} {self.autocast} {encoder}"

    def trace(self, rows: int, length: int) -> Trace:
        """A micro-batch's trace."""
        key = (self._key, rows, length)
        if key not in _TRACES:
            _TRACES[key] = self.subject.trace(rows, length, autocast=self.autocast)
        return _TRACES[key]

    def memory(self, micro: int) -> Memory:
        """What a micro-batch takes."""
        # One micro-batch of the longest is enough to run out of memory.
        found = self.trace(micro, self.lengths.longest)
        reserve = RESERVE_BYTES + round(RESERVE_SHARE * self.machine.memory_gib * GIB)
        working = found.peak - found.held
        # With several micro-batches DeepSpeed is told to add up gradients in fp32 (`deepspeed_settings`).
        held = states(self.sizes, self.sharding, self.machine.gpus, adds_up=micro < self.share)
        return Memory(micro, held.gpu, found.saved, working, held.update, reserve, held.host)

    def fits(self, micro: int) -> bool:
        """Whether a micro-batch fits."""
        return self.memory(micro).total <= self.machine.memory_gib * GIB

    def largest(self) -> int | None:
        """The largest micro-batch that fits and divides a GPU's share of the batch; None if not even one sample does."""
        # The whole share first: it is one trace instead of several, and with many GPUs it fits.
        if self.fits(self.share):
            return self.share
        # By halving, since memory grows with the micro-batch: each trial is a trace of seconds.
        return largest_true([m for m in range(1, self.share) if self.share % m == 0], self.fits)

    def plan(self, samples: int | None = None) -> Plan:
        """The plan.

        Args:
            samples: In the data, where steps depend on it; None counts them.

        Raises:
            InputError: The steps depend on data that are not here.
        """
        config: TrainConfig = self.recipe.train
        asked = config.micro_batch_size or self.share
        largest = self.largest()
        # What does not divide, mmkit refuses to train; then the plan is for what would be used instead.
        micro = asked if self.share % asked == 0 else largest or 1
        plan = Plan(
            recipe=self.name,
            stage=self.recipe.stage,
            machine=self.machine,
            sharding=self.sharding.name,
            precision=config.precision,
            checkpointing=checkpoints(self.recipe),
            parameters=self.sizes.total,
            trainable=self.sizes.trainable,
            lengths=self.lengths,
            batch_size=config.batch_size,
            accumulation=self.share // micro,
            asked_micro_batch_size=asked,
            memory=self.memory(micro),
            largest_micro_batch_size=largest,
            work=self.work(micro, samples),
            advice=[],
        )
        # Last, since advice looks at the finished plan.
        return dataclasses.replace(plan, advice=self._advice(plan))

    def work(self, micro: int, samples: int | None) -> Work:
        """Steps, operations and time with a micro-batch."""
        config: TrainConfig = self.recipe.train
        if config.epochs is not None and samples is None:
            samples = count(self.recipe)
        steps = total_steps(config, samples or 0)
        # The mean, because over a run lengths add up; attention, whose work grows with the square, is a small part.
        found = self.trace(micro, self.lengths.mean)
        model = (sum(found.forward.values()) + found.backward) // micro
        executed = found.executed // micro
        if isinstance(self.recipe, ContrastiveRecipe) and self.share > micro:
            # Embeddings of all micro-batches come first (ContrastiveObjective.prepare); a locked tower's features are kept.
            frozen = self.recipe.stage == "lit"
            # "tower" is the vision tower; the other is "text tower".
            again = {k: v for k, v in found.forward.items() if not (frozen and k.startswith("tower"))}
            executed += sum(again.values()) // micro
        # Whole batches, as in training: the last goes on into the next epoch.
        seen = steps * config.batch_size
        seconds = seen * executed / (self.machine.gpus * self.machine.tflops * 1e12 * self.machine.mfu)
        return Work(
            steps=steps,
            samples=seen,
            tokens=seen * self.lengths.mean,
            model_flops=model,
            executed_flops=executed,
            gpu_hours=seconds * self.machine.gpus / 3600,
            hours=seconds / 3600,
            samples_per_second=seen / seconds if seconds else 0.0,
        )

    def _advice(self, plan: Plan) -> list[str]:
        """What to change where the recipe does not run as it stands, and what would be quicker where it does."""
        largest, asked, micro = plan.largest_micro_batch_size, plan.asked_micro_batch_size, plan.memory.micro_batch_size
        if largest is None:
            return self._what_fits()
        if micro != asked:
            return [f"micro-batch {asked} does not divide a GPU's share of {self.share}: train.micro_batch_size={micro}"]
        if asked > largest:
            # First, because the update stays the same.
            smaller = f"train.micro_batch_size={largest} fits (accumulation {self.share // largest}, same batch)"
            return [smaller, *self._what_fits(asked)]
        return []

    def _what_fits(self, micro: int = 1) -> list[str]:
        """Changes that make a micro-batch fit: one at a time, and together where no single one is enough."""
        found: list[str] = []
        size = "" if micro == 1 else f" with micro-batch {micro}"
        for several in changes(self.recipe, self.sharding):
            for change in several:
                changed = with_values(self.recipe, change)
                # All of it anew: a change may cast the weights, cut them up, or keep other activations.
                other = Planner(changed, self.name, self.machine, encoder=self.encoder, lengths=self.lengths)
                words = " ".join(f"{key}={str(value).lower() if value is True else value}" for key, value in change.items())
                if other.fits(micro):
                    found.append(f"{words} fits{size} ({other.memory(micro).total / GIB:.1f} GiB)")
            if found:
                break
        if not found:
            what = "micro-batch of one sample" if micro == 1 else f"micro-batch of {micro}"
            found.append(f"no setting makes a {what} fit: use more GPUs with ZeRO-3, larger ones, or a smaller model")
        return found


def make_plan(
    recipe: Recipe,
    name: str,
    *,
    gpus: int,
    gpu: str = "h100",
    gpu_memory: float | None = None,
    tflops: float | None = None,
    # An assumption, and the only one in the hours; published trainings reach 0.1 to 0.6 (performance.md 1.3).
    mfu: float = 0.4,
    samples: int | None = None,
    tokens: int | None = None,
    longest: int | None = None,
    encoder: str | None = None,
) -> Plan:
    """Plan a recipe; the arguments are those of ``mmkit plan``.

    Args:
        recipe: Of a training stage.
        name: For the plan's head.
        gpus: Processes, one a GPU.
        gpu: A name of `hardware.GPUS`.
        gpu_memory: GiB of one; None: the kind's.
        tflops: Peak, 1e12 operations a second; None: the kind's in the recipe's precision.
        mfu: Share of it that is reached.
        samples: In the data; None counts them where steps depend on it.
        tokens: Mean length of a padded sequence; None: the longest.
        longest: Longest sequence; None: the recipe's limit.
        encoder: Stands in for an encoder that is not on this machine.

    Raises:
        InputError: As `Planner` raises it, or an unknown GPU.
    """
    if isinstance(recipe, ProbeRecipe | EvalRecipe):
        raise InputError(f"stage {recipe.stage} trains nothing", where="stage", mend="plan a training recipe")
    # One that is not in the table is known by its two numbers.
    kind = Gpu(gpu, tflops, tflops, gpu_memory) if tflops and gpu_memory else find_gpu(gpu)
    peak = tflops or (kind.tflops if recipe.train.precision == "bf16" else kind.tflops_fp32)
    machine = Machine(gpus, gpu_memory or kind.memory_gib, peak, mfu, kind.name)
    return Planner(recipe, name, machine, encoder=encoder, lengths=Lengths(tokens or 0, longest or 0)).plan(samples)


def _shape_keys(recipe: TrainRecipe) -> str:
    """What of a recipe decides the modules and the size of their tensors."""
    # What decides neither a module nor a shape. `train` too, but for its batch below and the precision, which is in the key.
    aside = {"run", "system", "seed", "data", "track", "train", "monitor"}
    found = recipe.model_dump_json(exclude=aside)
    # The vocabulary of the label head, and the features that a contrastive loss compares.
    labels = getattr(recipe.data, "labels", None)
    compared = recipe.train.batch_size if isinstance(recipe, ContrastiveRecipe) else None
    return f"{found} {labels} {compared}"


def largest_true(values: list[int], test: Callable[[int], bool]) -> int | None:
    """The largest of ascending values that passes a test which holds below some bound and not above."""
    low, high = 0, len(values)
    # values[:low] are known to pass, values[high:] not to.
    while low < high:
        middle = (low + high) // 2
        if test(values[middle]):
            low = middle + 1
        else:
            high = middle
    return values[low - 1] if low else None


def checkpoints(recipe: TrainRecipe) -> bool:
    """Whether activations are recomputed."""
    if isinstance(recipe, PretrainRecipe):
        return recipe.encoder.grad_checkpointing
    return isinstance(recipe, LlavaRecipe) and recipe.grad_checkpointing


def changes(recipe: TrainRecipe, sharding: Sharding) -> list[list[dict[str, Any]]]:
    """Recipe keys that save memory and are not set yet: each alone, and those that go together."""
    singles: list[dict[str, Any]] = []
    if isinstance(recipe, PretrainRecipe) and not recipe.encoder.grad_checkpointing:
        singles.append({"encoder.grad_checkpointing": True})
    if isinstance(recipe, LlavaRecipe) and not recipe.grad_checkpointing:
        singles.append({"grad_checkpointing": True})
    stages = [s for s in ("zero2", "zero3") if int(s[-1]) > (sharding.stage or 0)]
    if not sharding.offload_optimizer:
        stages.append("zero3-offload")
    sharded = [{"train.deepspeed": stage} for stage in stages]
    return [[*singles, *sharded], [{**singles[0], **one} for one in sharded if singles]]


def with_values(recipe: TrainRecipe, values: dict[str, Any]) -> TrainRecipe:
    """A recipe with other values at dotted keys."""
    tree = recipe.model_dump(mode="json")
    for key, value in values.items():
        *path, last = key.split(".")
        place = tree
        for part in path:
            place = place[part]
        place[last] = value
    # Through the schema: what is advised must be a recipe that runs.
    changed = check_recipe(tree, where="plan")
    assert not isinstance(changed, ProbeRecipe | EvalRecipe)  # the stage is still the same
    return changed


def _nearest_divisor(batch: int, gpus: int) -> int:
    """The number of GPUs nearest to the one asked for that divides a batch."""
    # Of two that are as near the smaller.
    return min((n for n in range(1, batch + 1) if batch % n == 0), key=lambda n: (abs(n - gpus), n))
