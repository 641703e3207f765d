"""The figures of a plan."""

from __future__ import annotations

import dataclasses
from typing import Any

from mmkit.plan.hardware import GIB


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the plan is for.

    Attributes:
        gpus: Processes, one a GPU.
        memory_gib: Of one GPU.
        tflops: Peak of dense products in the recipe's precision, 1e12 operations a second.
        mfu: Share of the peak that the executed operations reach: an assumption.
        name: Of the GPU.
    """

    gpus: int
    memory_gib: float
    tflops: float
    mfu: float
    name: str


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths of token sequences, pictures' tokens included; 0 where a stage has none.

    Attributes:
        mean: Of a padded sequence, for the operations.
        longest: For the memory.
    """

    mean: int = 0
    longest: int = 0


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one GPU for one micro-batch.

    Attributes:
        micro_batch_size: Samples a process and forward pass.
        states: Weights, gradients, optimizer, buckets, by part.
        activations: Alive between forward and backward, by part.
        working: What backward takes beyond them at its peak.
        update: What the optimizer's update takes beyond the states, when no activations are alive.
        reserve: Left free for what is not modelled.
        host: In host memory for this process, by part.
    """

    micro_batch_size: int
    states: dict[str, int]
    activations: dict[str, int]
    working: int
    update: int
    reserve: int
    host: dict[str, int]

    @property
    def step(self) -> int:
        """Most that a step takes beyond the states."""
        # Never both: the update comes when backward has freed the activations.
        return max(sum(self.activations.values()) + self.working, self.update)

    @property
    def total(self) -> int:
        """Bytes that have to be there."""
        return sum(self.states.values()) + self.step + self.reserve


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations and time.

    Attributes:
        steps: Updates.
        samples: Seen in all.
        tokens: Seen in all, padding and pictures' tokens included; 0 where there are no sequences.
        model_flops: Operations a sample, forward and backward.
        executed_flops: With what is computed twice: checkpointed blocks, the second pass of contrastive accumulation.
        gpu_hours: Of all steps.
        hours: Wall clock.
        samples_per_second: That the data must arrive at, over all GPUs.
    """

    steps: int
    samples: int
    tokens: int
    model_flops: int
    executed_flops: int
    gpu_hours: float
    hours: float
    samples_per_second: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """The whole of it."""

    recipe: str
    stage: str
    machine: Machine
    sharding: str
    precision: str
    checkpointing: bool
    parameters: int
    trainable: int
    lengths: Lengths
    batch_size: int
    accumulation: int
    asked_micro_batch_size: int
    memory: Memory
    largest_micro_batch_size: int | None
    work: Work
    advice: list[str]

    @property
    def fits(self) -> bool:
        """Whether the recipe's own micro-batch fits and divides."""
        # A plan for another micro-batch than the recipe's says nothing of the recipe itself.
        largest = self.largest_micro_batch_size
        return largest is not None and self.memory.micro_batch_size == self.asked_micro_batch_size and self._room

    @property
    def _room(self) -> bool:
        return self.memory.total <= self.machine.memory_gib * GIB

    def as_json(self) -> dict[str, Any]:
        """Plain values, bytes in bytes, with the sums that the table shows."""
        found = dataclasses.asdict(self)
        # asdict knows fields only, and a reader of the JSON should not have to add up.
        found["memory"] |= {"total": self.memory.total, "step": self.memory.step}
        return {**found, "fits": self.fits}
