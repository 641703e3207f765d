from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mmkit.config import TrainConfig
from mmkit.training.loop import total_steps
from mmkit.training.optim import lr_scale, make_optimizer, parameter_groups, warmup_steps


def scales(schedule: str, *, total: int = 8, warmup: int = 2, ratio: float = 0.0) -> list[float]:
    return [lr_scale(s, total=total, schedule=schedule, warmup_steps=warmup, min_ratio=ratio) for s in range(total + 1)]


def test_cosine_is_exact():
    # After two steps of warm-up: half a cosine over the six that are left.
    expected = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(7)]
    assert scales("cosine") == pytest.approx(expected, abs=1e-12)
    assert scales("cosine")[2] == 1.0 and scales("cosine")[5] == pytest.approx(0.5) and scales("cosine")[8] == pytest.approx(0.0)


def test_linear_and_constant_are_exact():
    assert scales("linear") == pytest.approx([0.5, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0])
    assert scales("constant") == [0.5] + [1.0] * 8


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_min_ratio_is_where_the_schedule_ends(schedule):
    assert scales(schedule, ratio=0.1)[-1] == pytest.approx(0.1)
    assert scales(schedule, ratio=0.1)[2] == 1.0
    # Past the end nothing moves: a run that is longer than its schedule never turns round.
    assert lr_scale(50, total=8, schedule=schedule, warmup_steps=2, min_ratio=0.1) == pytest.approx(0.1)


def test_no_warmup_starts_at_the_base_rate():
    assert lr_scale(0, total=10, schedule="cosine", warmup_steps=0) == 1.0
    assert lr_scale(0, total=0, schedule="linear", warmup_steps=0) == 1.0


@pytest.mark.parametrize(("warmup", "total", "steps"), [(0, 100, 0), (0.03, 100, 3), (0.03, 40, 2), (1, 9, 1), (50, 600, 50)])
def test_warmup_is_steps_or_a_share(warmup, total, steps):
    assert warmup_steps(warmup, total) == steps


@pytest.mark.parametrize(
    ("length", "expected"),
    [({"steps": 7}, 7), ({"samples": 33}, 5), ({"epochs": 2.0}, 25), ({"epochs": 0.5}, 7), ({"steps": 0}, 0)],
)
def test_length_of_a_run(length, expected):
    assert total_steps(TrainConfig(batch_size=8, lr=1e-3, **length), samples=100) == expected


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(3, 3)
        self.projector = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.scale = nn.Parameter(torch.ones(()))
        self.tower.weight.requires_grad_(False)


def test_groups_decay_matrices_only_and_leave_frozen_parts_out():
    model = Model()
    groups = parameter_groups(model.named_parameters(), lr=0.1, weight_decay=0.2)
    by_decay = {g["weight_decay"]: g for g in groups}
    assert set(by_decay) == {0.0, 0.2}
    assert [p is model.projector.weight for p in by_decay[0.2]["params"]] == [True]
    plain = {id(p) for p in by_decay[0.0]["params"]}
    assert plain == {id(p) for p in (model.tower.bias, model.projector.bias, model.norm.weight, model.norm.bias, model.scale)}
    assert all(g["lr"] == g["base_lr"] == 0.1 for g in groups)


def test_base_lr_goes_by_the_prefix_of_the_name():
    model = Model()
    groups = parameter_groups(model.named_parameters(), lr=0.1, weight_decay=0.2, lr_of={"projector": 0.003})
    rate = {id(p): (g["base_lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert rate[id(model.projector.weight)] == (0.003, 0.2)
    assert rate[id(model.projector.bias)] == (0.003, 0.0)
    assert rate[id(model.norm.weight)] == (0.1, 0.0)
    assert len(rate) == 6 and len(groups) == 3


def test_adamw_steps_as_the_formula_says():
    weight = nn.Parameter(torch.tensor([[2.0]]))
    optimizer = make_optimizer(
        parameter_groups([("w", weight)], lr=0.1, weight_decay=0.5), betas=(0.9, 0.98), eps=1e-8, device=torch.device("cpu")
    )
    weight.grad = torch.tensor([[3.0]])
    optimizer.step()
    # Decoupled decay first, then a first step of length lr in the gradient's direction (Loshchilov and Hutter, algorithm 2).
    assert float(weight.detach()) == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, abs=1e-6)
    assert optimizer.param_groups[0]["base_lr"] == 0.1 and optimizer.param_groups[0]["betas"] == (0.9, 0.98)
