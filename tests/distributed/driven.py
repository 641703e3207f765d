"""Steps driven by hand: what a rank sees, and in how many pieces, is the test's choice and not the data order's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmkit.config import TrainConfig, load_recipe
from mmkit.distributed.engine import Engine
from mmkit.distributed.skeleton import partition
from mmkit.recipes import find_deepspeed, find_recipe
from mmkit.training.objective import Stage, to_device
from mmkit.training.optim import make_optimizer, parameter_groups
from mmkit.training.stages import build_stage


def cut(rows: list[int], sizes: list[int]) -> list[list[int]]:
    """Rows in pieces of the given sizes; the last takes the rest."""
    ends = np.cumsum(sizes)[:-1]
    return [list(map(int, piece)) for piece in np.split(np.asarray(rows), ends)]


def build(words: list[str]) -> tuple[Engine, Stage, TrainConfig]:
    """Engine and stage of a recipe (name and overrides)."""
    recipe: Any = load_recipe(find_recipe(words[0]), words[1:])
    config = recipe.train
    engine = Engine(
        precision=config.precision,
        deepspeed=find_deepspeed(config.deepspeed) if config.deepspeed else None,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        clip=config.clip_grad_norm,
    )
    return engine, build_stage(recipe, engine), config


def prepare(engine: Engine, stage: Stage, config: TrainConfig) -> None:
    """Make the optimizer and wrap the objective, as the loop does."""
    named = stage.objective.named_parameters()
    groups = parameter_groups(named, lr=config.lr, weight_decay=config.weight_decay, lr_of=stage.lr_of)
    engine.prepare(stage.objective, make_optimizer(groups, betas=config.betas, eps=config.eps, device=engine.device))


class Tower(torch.nn.Module):
    """Many equal layers, a frozen one, a tied head and a buffer."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))
        self.layers[0].requires_grad_(False)
        self.tied = torch.nn.Linear(width, width)
        self.tied.weight = self.layers[1].weight
        self.register_buffer("scale", torch.linspace(0.5, 1.0, width), persistent=False)

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        x = batch["x"]
        for layer in self.layers:
            x = torch.tanh(layer(x)) * self.scale
        return self.tied(x).square().sum()


def _memory(field: str) -> int:
    """Bytes that /proc says of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def hand_out(*, settings: str, out: str, width: int, layers: int, empty: bool) -> None:
    """Cut a tower up (on rank 1 from the meta device, if ``empty``), train and put it together; notes memory, losses, the sum."""
    engine = Engine(precision="fp32", deepspeed=Path(settings), batch_size=4, micro_batch_size=2, clip=None)
    torch.manual_seed(0)
    with torch.device("meta" if empty and engine.skeleton else "cpu"):
        module = Tower(width, layers)
    before = _memory("VmRSS")
    # Forget the peak so far: these processes have done other things.
    Path("/proc/self/clear_refs").write_text("5")
    partition(module, engine._settings, dtype=torch.float32, device=engine.device)
    peak = _memory("VmHWM") - before
    assert module.tied.weight is module.layers[1].weight
    trained = [p for p in module.parameters() if p.requires_grad]
    engine.prepare(module, torch.optim.AdamW([{"params": trained, "base_lr": 1e-3}], lr=1e-3))
    losses = []
    for _ in range(2):
        x = torch.ones(2, width) * (engine.rank + 1)
        losses.append(float(engine.sum(engine.forward_backward({"x": x}, count=torch.tensor(4.0), last=True))))
        engine.update(1.0, broken=torch.tensor(False))
    with engine.whole_on_main():
        total = float(sum(p.double().sum() for p in module.parameters())) if engine.is_main else None
    # Pieces are back in place: all together are what the main process had.
    with engine.gathered():
        again = float(sum(p.double().sum() for p in module.parameters()))
    found = engine.gather([{"rank": engine.rank, "peak": peak, "losses": losses, "total": total, "again": again}])
    if engine.is_main:
        Path(out).write_text(json.dumps(found))
    engine.barrier()
    engine.close()


def copy_checkpoint(*, words: list[str], run: str, out: str) -> None:
    """Load a run's checkpoint and write it again, with no step between."""
    engine, stage, config = build(words)
    engine.place(stage.objective)
    prepare(engine, stage, config)
    engine.load(Path(run) / "checkpoints" / "step-00000002")
    for file in engine.snapshot()[0]:
        file.write(Path(out))
    engine.barrier()
    engine.close()


def drive(*, words: list[str], out: str, steps: list[dict[str, Any]], tower: bool) -> None:
    """Train a recipe's stage for a few steps of chosen samples, and save its product.

    Args:
        words: Recipe and overrides.
        out: Where ``steps.json`` (loss, gradient norm) and ``model`` go.
        steps: Each with ``rows`` (samples of the whole step; a process takes its share in order) and ``sizes``, by number of
            processes the sizes of the pieces that a share comes in.
        tower: Whether the vision tower trains too.
    """
    engine, stage, config = build(words)
    objective: Any = stage.objective
    engine.place(objective)
    if tower:
        # What lies before the layer that is read; DDP refuses parameters that never take part.
        vision: Any = objective.model.model.vision_tower
        vision.embeddings.requires_grad_(True)
        vision.encoder.layers[: objective.model.config.vision_feature_layer + 1].requires_grad_(True)
    prepare(engine, stage, config)
    objective.train()
    found = []
    for step in steps:
        size = len(step["rows"]) // engine.world_size
        share = step["rows"][engine.rank * size : (engine.rank + 1) * size]
        pieces = cut(share, step["sizes"][str(engine.world_size)])
        batches = [stage.collate([stage.samples.load(i, np.random.default_rng(0)) for i in piece]) for piece in pieces]
        count = engine.sum(engine.numbers(sum(objective.count(batch) for batch in batches)))[0]
        total = torch.zeros((), device=engine.device)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            total += engine.forward_backward(to_device(batch, engine.device), count=count, last=last)
        loss = engine.sum(total) / count
        norm = engine.gradient_norm()
        inner = engine.update(1.0, broken=torch.tensor(False))
        found.append((float(loss), float(inner if norm is None else norm)))
    with engine.gathered():
        engine.on_main(lambda: stage.save_product(Path(out) / "model"))
    if engine.is_main:
        (Path(out) / "steps.json").write_text(json.dumps(found))
    engine.barrier()
    engine.close()
