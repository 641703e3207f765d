"""The contract between the one loop and what is being trained."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mmkit.config import BatchingConfig
from mmkit.data.batching import Lengths
from mmkit.data.layout import Layout
from mmkit.data.loader import SampleSet
from mmkit.data.skipped import LeftOut, count_samples
from mmkit.run import Parent

# For a name in `Monitor.look`: what is trained knows nothing of processes.
if TYPE_CHECKING:
    from mmkit.distributed.engine import Engine

Batch = dict[str, Any]


class Sizes(NamedTuple):
    """What a batch costs: true tokens, positions the model computes (padding included), samples that were cut to fit."""

    tokens: int
    positions: int
    cut: int = 0


class Objective(nn.Module, ABC):
    """A single-device module that turns a batch into a loss *sum*; it knows nothing of ranks, steps or optimizers."""

    # A sum and not a mean: means of micro-batches of unequal counts do not add up to the mean of the batch.
    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """Sum of the losses of a batch, fp32 scalar with gradient."""

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """What the sum is divided by, added over the whole step: labelled rows or supervised tokens.

        The batch is still on the CPU here, so that counting never waits for the device.
        """

    def sizes(self, batch: Batch) -> Sizes | None:
        """Tokens of a batch, for the log; on the CPU, as for :meth:`count`. None where a sample has no length."""
        return None

    # Integers, because their sum does not depend on the order in which the ranks are added.
    def statistics(self, batches: list[Batch]) -> Tensor | None:
        """Integer counts of this process's micro-batches of a step, on the device, for the loop to sum over ranks; None: none."""
        return None

    def absorb(self, total: Callable[[], Tensor]) -> None:
        """Take in the global counts of :meth:`statistics` before the loss of this step.

        Args:
            total: Waits for the sum and returns it; call it once, as late as possible: it runs beside the forward pass.
        """

    def prepare(self, batches: list[Batch]) -> None:
        """See all micro-batches of a step before the first forward pass, on the device and under autocast.

        For losses that compare samples across micro-batches (CLIP with accumulation). Most need nothing.
        """

    def compile_parts(self) -> None:
        """Compile what is worth it (``train.compile``); the whole forward pass unless a stage knows better."""
        # In place: optimizer, engine and product writer go on holding the same object.
        self.compile()

    def evaluate(self, batch: Batch) -> dict[str, float]:
        """Extra validation sums (hits, ...) of the batch that forward has just seen in eval mode. Divided by the count."""
        return {}


@dataclasses.dataclass
class Finding:
    """What a monitor saw.

    Attributes:
        numbers: For metrics.jsonl and the tracker.
        pictures: For the tracker, uint8 ``[H, W, 3]``.
        texts: Rows for samples.jsonl, such as captions beside their references.
    """

    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    pictures: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = dataclasses.field(default_factory=dict)
    texts: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class Monitor(Protocol):
    """A look at the model every so often; every process calls it at the same step, the objective is in eval mode."""

    every: int

    def look(self, engine: Engine) -> Finding:
        """What there is to see now."""
        ...


@dataclasses.dataclass
class Stage:
    """Everything that makes a stage different from another; built by ``mmkit/training/stages``.

    Attributes:
        objective: The module to train.
        samples: Training samples.
        collate: Samples to a batch of tensors.
        save_product: Writes the product into a folder; called on the main process, with all weights gathered.
        parents: What the run is made from.
        data_fingerprint: Hash of the data's index: equal for stages that read the same samples.
        readings: Fingerprints of what the data are read with (labels, IDF table); a run does not go on with others.
        left_out: Rows that the index already had to leave out.
        available: Samples of the data before the recipe's limit, which `left_out` belongs to; None: there is no limit.
        layout: Shards, shuffle windows and weights of the samples; None: all are shuffled alike.
        batching: How samples are put together.
        lengths: Tokens of each sample, for grouped and packed batches.
        validation: Samples for the validation loss.
        validation_group: Validation samples that are seen together; None: a micro-batch.
        lr_of: Other learning rates by parameter-name prefix.
        undecayed: Ends of names of parameters without weight decay, besides vectors. timm's class and register tokens are
            [1, N, D]; they are vectors all the same, and x-cls/superclass does not decay its class embedding.
        monitors: What else is looked at every so often while training runs.
    """

    objective: Objective
    samples: SampleSet[Any]
    collate: Callable[[list[Any]], Batch]
    save_product: Callable[[Path], None]
    parents: list[Parent]
    data_fingerprint: str
    readings: dict[str, str] = dataclasses.field(default_factory=dict)
    left_out: list[LeftOut] = dataclasses.field(default_factory=list)
    available: int | None = None
    layout: Layout | None = None
    batching: BatchingConfig = dataclasses.field(default_factory=BatchingConfig)
    lengths: Lengths | None = None
    validation: SampleSet[Any] | None = None
    validation_group: int | None = None
    lr_of: dict[str, float] = dataclasses.field(default_factory=dict)
    undecayed: tuple[str, ...] = ("cls_token", "reg_token")
    monitors: list[Monitor] = dataclasses.field(default_factory=list)

    @property
    def counted_from(self) -> int:
        """Samples that the share of left-out ones is taken from."""
        # Rows that the index left out never became samples.
        return (len(self.samples) if self.available is None else self.available) + count_samples(self.left_out)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Tensors of a batch on the device, the rest untouched."""
    # Keys and the like stay on the host: they are for messages.
    # non_blocking takes effect from pinned memory alone, which the training loader gives on a GPU.
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
