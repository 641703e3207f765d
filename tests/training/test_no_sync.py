"""A training step never makes the host wait for the device.

Without a GPU the step is walked on the meta device, whose tensors have shapes and no values: whatever asks for a value
(``.item()``, a tensor as condition) raises. With one, torch's own sync detector watches a real step.
"""

from __future__ import annotations

import pytest
import torch

from mmkit.encoders import OnlineIDF, SuperClassHead, build_encoder, make_kind
from mmkit.encoders.loss_kinds import KINDS
from mmkit.encoders.text import TextTower, text_settings
from mmkit.training.optim import make_optimizer, parameter_groups
from mmkit.training.stages.contrastive import ContrastiveObjective
from mmkit.training.stages.superclass import SuperclassObjective

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2}


def superclass(kind: str) -> SuperclassObjective:
    encoder = build_encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, model_args=TINY, seed=0)
    return SuperclassObjective(encoder, SuperClassHead(32, 101), OnlineIDF(101), loss=make_kind(kind), chunk_rows=4)


def clip(kind: str) -> ContrastiveObjective:
    encoder = build_encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, model_args=TINY, seed=0)
    settings = text_settings(32, embed_dim=16, width=32, heads=2, layers=1, context_length=8)
    tower = TextTower(32, **settings, kind=kind)
    return ContrastiveObjective(encoder, tower, kind=kind, gather=lambda x: (x, 0), chunk_rows=8)


def batch() -> dict[str, torch.Tensor]:
    """Six pictures, labels, texts and kept patches on the current (fake) device."""
    return {
        "pixels": torch.zeros(6, 3, 32, 32, dtype=torch.uint8),
        "keep": torch.arange(8).expand(6, 8).contiguous(),
        "ids": torch.arange(18),
        "offsets": torch.tensor([0, 3, 6, 6, 9, 12, 18]),
        "text": torch.ones(6, 8, dtype=torch.int64),
    }


def step(objective: torch.nn.Module, optimizer: torch.optim.Optimizer | None, made: dict[str, torch.Tensor]) -> None:
    """What the loop does with a micro-batch between two reads of the host."""
    statistics = objective.statistics([made])
    if statistics is not None:
        objective.absorb(lambda: statistics)
    objective.prepare([made])
    loss = objective(made)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in objective.parameters()])
    broken = (~(loss + norm).isfinite()).float()
    if optimizer is None:  # the fused update exists on real devices only
        return
    optimizer.found_inf = broken
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def optimizer_of(objective: torch.nn.Module, device: torch.device) -> torch.optim.Optimizer:
    groups = parameter_groups(objective.named_parameters(), lr=1e-3, weight_decay=0.1)
    return make_optimizer(groups, betas=(0.9, 0.98), eps=1e-6, device=device)


CASES = [*(pytest.param(superclass, k, id=k) for k in KINDS), *(pytest.param(clip, k, id=k) for k in ("infonce", "sigmoid"))]


def test_the_watch_notices_a_sync() -> None:
    with pytest.raises(RuntimeError, match=r"meta"):
        float(torch.ones(3, device="meta").sum())


@pytest.mark.parametrize(("make", "kind"), CASES)
def test_no_step_asks_for_a_value(make, kind: str) -> None:
    objective = make(kind).train().to("meta")
    step(objective, None, {k: v.to("meta") for k, v in batch().items()})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize(("make", "kind"), CASES)
def test_no_step_waits_for_the_gpu(make, kind: str) -> None:
    objective = make(kind).cuda().train()
    optimizer = optimizer_of(objective, torch.device("cuda"))
    made = {k: v.cuda() for k, v in batch().items()}
    step(objective, optimizer, made)  # state of the optimiser, libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(objective, optimizer, made)
    finally:
        torch.cuda.set_sync_debug_mode("default")
