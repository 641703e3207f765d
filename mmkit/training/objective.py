"""The contract between the one loop and what is being trained."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.data.order import SampleSet
from mmkit.data.skipped import LeftOut
from mmkit.run import Parent

Batch = dict[str, Any]


class Objective(nn.Module, ABC):
    """A single-device module that turns a batch into a loss *sum*; it knows nothing of ranks, steps or optimizers."""

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """Sum of the losses of a batch, fp32 scalar with gradient."""

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """What the sum is divided by, added over the whole step: labelled rows or supervised tokens."""

    def statistics(self, batches: list[Batch]) -> Tensor | None:
        """Integer counts of this process's batches that the loop sums over ranks before the forward pass; None: no such thing."""
        return None

    def absorb(self, statistics: Tensor) -> None:
        """Take in the global counts of :meth:`statistics`."""

    def evaluate(self, batch: Batch) -> dict[str, float]:
        """Extra validation sums (hits, ...) of the batch that forward has just seen in eval mode. Divided by the count."""
        return {}


@dataclasses.dataclass
class Stage:
    """Everything that makes a stage different from another; built by ``mmkit/training/stages``.

    Attributes:
        objective: The module to train.
        samples: Training samples.
        collate: Samples to a batch of tensors.
        save_product: Writes the product into a folder; called on the main process, with all weights gathered.
        parents: What the run is made from.
        data_fingerprint: Hash of the data's index.
        left_out: Rows that the index already had to leave out.
        validation: Samples for the validation loss.
        lr_of: Other learning rates by parameter-name prefix.
    """

    objective: Objective
    samples: SampleSet[Any]
    collate: Callable[[list[Any]], Batch]
    save_product: Callable[[Path], None]
    parents: list[Parent]
    data_fingerprint: str
    left_out: list[LeftOut] = dataclasses.field(default_factory=list)
    validation: SampleSet[Any] | None = None
    lr_of: dict[str, float] = dataclasses.field(default_factory=dict)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Tensors of a batch on the device, the rest untouched."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
