"""Bytes that a model's weights, gradients and optimizer take on each process, with and without DeepSpeed.

After DeepSpeed 0.19 (runtime/engine.py, runtime/zero/stage_1_and_2.py, stage3.py, runtime/fp16) and mmkit's settings of it
(`mmkit.distributed.settings`): gradients are kept in the model's dtype and become fp32 for the update only, but where a step adds
up several micro-batches under ZeRO-1 to 3; there they are fp32.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How weights and optimizer are spread over processes: the zero_optimization section of a DeepSpeed JSON.

    Attributes:
        stage: ZeRO stage 0 to 3; None is mmkit's own engine, one process or DDP.
        offload_optimizer: Optimizer state in host memory.
        offload_param: Weights in host memory too (stage 3).
        bucket: Elements reduced at a time.
        overlap: Reduced while backward goes on, which takes a second bucket.
        prefetch: Elements gathered ahead (stage 3).
        live: Gathered elements kept for reuse at most (stage 3).
        persistent: Weights of fewer elements stay whole (stage 3).
        sub_group: Elements updated at a time (stage 3).
    """

    stage: int | None = None
    offload_optimizer: bool = False
    offload_param: bool = False
    bucket: int = 500_000_000
    overlap: bool = False
    prefetch: int = 50_000_000
    live: int = 1_000_000_000
    persistent: int = 100_000
    sub_group: int = 1_000_000_000

    @classmethod
    def of(cls, path: Path | None) -> Sharding:
        """From a DeepSpeed JSON; None is DDP. What the file leaves out is DeepSpeed's default (runtime/zero/config.py)."""
        if path is None:
            return cls()
        zero: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")).get("zero_optimization", {})
        stage = int(zero.get("stage", 0))
        return cls(
            stage=stage,
            offload_optimizer=_offloads(zero, "offload_optimizer"),
            offload_param=_offloads(zero, "offload_param"),
            bucket=int(zero.get("reduce_bucket_size", cls.bucket)),
            # DeepSpeed decides by the stage where the file does not (config.py, overlap_comm_valid).
            overlap=bool(zero.get("overlap_comm", stage == 3)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", cls.prefetch)),
            live=int(zero.get("stage3_max_live_parameters", cls.live)),
            persistent=int(zero.get("stage3_param_persistence_threshold", cls.persistent)),
            sub_group=int(zero.get("sub_group_size", cls.sub_group)),
        )

    @property
    def name(self) -> str:
        """In words."""
        if self.stage is None:
            return "DDP"
        moved = "weights and optimizer" if self.offload_param else "optimizer"
        return f"ZeRO-{self.stage}" + (f", {moved} offloaded" if self.offload_optimizer or self.offload_param else "")


def _offloads(zero: dict[str, Any], key: str) -> bool:
    """Whether a part goes to the host (or further)."""
    return str((zero.get(key) or {}).get("device", "none")) != "none"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A model in numbers.

    Attributes:
        trainable: Elements that train.
        frozen: Elements that do not.
        trainable_bytes: Of the weights that train, in the dtype they compute with.
        frozen_bytes: Of the others.
        buffer_bytes: Of buffers.
        small: Elements of weights below the size that stays whole under ZeRO-3.
    """

    trainable: int
    frozen: int
    trainable_bytes: int
    frozen_bytes: int
    buffer_bytes: int
    small: int

    @classmethod
    def of(cls, module: nn.Module, *, persistent: int = 0) -> Sizes:
        """Count a module, tied weights once."""
        trains = [p for p in module.parameters() if p.requires_grad]
        rests = [p for p in module.parameters() if not p.requires_grad]
        return cls(
            trainable=sum(p.numel() for p in trains),
            frozen=sum(p.numel() for p in rests),
            trainable_bytes=sum(p.numel() * p.element_size() for p in trains),
            frozen_bytes=sum(p.numel() * p.element_size() for p in rests),
            buffer_bytes=sum(b.numel() * b.element_size() for b in module.buffers()),
            # Frozen ones too: the threshold asks for the size alone.
            small=sum(p.numel() for p in module.parameters() if p.numel() < persistent),
        )

    def with_quantised(self, elements: int) -> Sizes:
        """The same with that many frozen elements as NF4, their scales quantised once more (arXiv 2305.14314, section 3).

        4 bits an element, 8 for each 64 of them, 32 for each 64 x 256.
        """
        if not elements:
            return self
        # Frozen weights of one model have one dtype.
        width = self.frozen_bytes // self.frozen
        packed = -(-elements // 2) + -(-elements // 64) + 4 * -(-elements // (64 * 256))
        return dataclasses.replace(self, frozen_bytes=self.frozen_bytes - width * elements + packed)

    @property
    def total(self) -> int:
        """All elements."""
        return self.trainable + self.frozen


@dataclasses.dataclass(frozen=True)
class States:
    """Bytes on one process.

    Attributes:
        gpu: By part, all through training.
        update: For the optimizer's update only, when no activations are alive.
        host: In host memory, by part.
    """

    gpu: dict[str, int]
    update: int
    host: dict[str, int]


def states(sizes: Sizes, sharding: Sharding, processes: int, *, adds_up: bool = False) -> States:
    """Where the bytes are.

    Args:
        sizes: Of the model, in the dtype it computes with.
        sharding: How it is spread.
        processes: N.
        adds_up: Whether a step has several micro-batches.

    Returns:
        Bytes on each process.
    """
    stage, n = sharding.stage, processes
    # AdamW: two moments in the dtype of what it updates, fp32 in either engine.
    moments = 8 * sizes.trainable
    if stage is None:
        # The fp32 weights are what is updated; DDP's buckets are the gradients themselves (gradient_as_bucket_view).
        gpu = {"trainable weights": sizes.trainable_bytes, "gradients": sizes.trainable_bytes, "optimizer": moments}
        return States(_with_rest(gpu, sizes, 1), 0, {})
    return _zero(sizes, sharding, n, stage, moments, adds_up)


def _zero(sizes: Sizes, sharding: Sharding, n: int, stage: int, moments: int, adds_up: bool) -> States:
    """The bytes of ZeRO stages 0 to 3."""
    # bf16 weights, which DeepSpeed updates through an fp32 copy.
    narrow = sizes.trainable_bytes < 4 * sizes.trainable
    # Stage 0 in fp32 hands the weights themselves to the optimizer; everything else updates fp32 copies.
    master = 4 * sizes.trainable if stage or narrow else 0
    # Stage 0 shares nothing, 1 the optimizer and its fp32 weights, 2 the gradients too, 3 the weights as well.
    part = n if stage else 1
    # As `deepspeed_settings` asks for it; stage 0 adds up in the weights' dtype.
    wide = bool(adds_up and stage)
    summed = 4 * sizes.trainable if wide else sizes.trainable_bytes
    gpu = {
        "trainable weights": _share(sizes.trainable_bytes, n if stage == 3 else 1),
        "gradients": _share(summed, n if stage >= 2 else 1),
        "fp32 copy of weights": _share(master, part),
        "optimizer": _share(moments, part),
    }
    gpu = _with_rest(gpu, sizes, n if stage == 3 else 1)
    width = sizes.trainable_bytes // max(1, sizes.trainable)
    if stage:
        # No bucket is larger than what there is to reduce.
        gpu["reduction buckets"] = width * min(sharding.bucket, sizes.trainable) * (2 if sharding.overlap else 1)
    if stage == 3:
        # The shares of the others, for as long as a layer and those that are used again soon need them.
        # Those below the threshold stay gathered for good.
        gathered = min(sharding.live + sharding.prefetch, sizes.total) + min(sizes.small, sizes.total)
        gpu["gathered weights"] = width * min(gathered, sizes.total)
    # Gradients become fp32 beside the narrow ones, stage 3 in groups.
    update = _share(4 * sizes.trainable, part) if narrow and not wide else 0
    if stage == 3:
        update = min(update, 4 * sharding.sub_group)
    host: dict[str, int] = {}
    if sharding.offload_optimizer:
        moved = ["fp32 copy of weights", "optimizer"] + (["gradients"] if stage >= 2 else [])
        host = {name: gpu.pop(name) for name in moved}
        # On the host gradients are fp32 from the start where the stage has no buffer of its own for them (stage_1_and_2.py).
        host["gradients"] = _share(4 * sizes.trainable, part)
        # Made on the host.
        update = 0
    if sharding.offload_param and stage == 3:
        for name in ("trainable weights", "frozen weights"):
            host[name] = gpu.pop(name, 0)
    return States(gpu, update, host)


def _with_rest(gpu: dict[str, int], sizes: Sizes, parts: int) -> dict[str, int]:
    """Add what takes no gradient."""
    found = dict(gpu)
    if sizes.frozen_bytes:
        found["frozen weights"] = _share(sizes.frozen_bytes, parts)
    if sizes.buffer_bytes:
        found["buffers"] = sizes.buffer_bytes
    return found


def _share(size: int, parts: int) -> int:
    """A process's part, rounded up."""
    return -(-size // parts)
