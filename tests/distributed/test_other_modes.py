"""A run goes on in any mode and on any number of processes from the checkpoint of any other, as if nothing had happened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pipeline
import pytest
import torch
from modes import deepspeed
from pair import Pair

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed on CPUs and CUDA do not mix in one environment"),
]
COMMON = ["train.steps=4", "train.checkpoint_every=2", "train.keep_checkpoints=9", "train.warmup=2", "train.weight_decay=0.1"]
COMMON += ["train.eps=1e-4", "train.clip_grad_norm=0.5", "track.kind=none"]
# Mode and whether it is one process alone.
Mode = tuple[str | int, bool]


def begin(pair: Pair, run: Path, mode: Mode, *more: str) -> Path:
    """A finished run of four steps with a checkpoint in the middle."""
    run.parent.mkdir(exist_ok=True)
    pair(pipeline.finetune(run, *COMMON, *more, *deepspeed(mode[0], run.parent)), alone=mode[1])
    return run


def rewound(run: Path, to: Path) -> Path:
    """A copy of a finished run in another place, as it was after its second step."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "model")
    shutil.rmtree(to / "checkpoints" / "step-00000004")
    recipe = (to / "recipe.yaml").read_text()
    assert f"run: {run}" in recipe
    (to / "recipe.yaml").write_text(recipe.replace(f"run: {run}", f"run: {to}"))
    (to / "manifest.json").write_text(json.dumps({**pipeline.manifest(to), "status": "running"}))
    return to


@pytest.fixture(scope="module")
def begun(pair, tmp_path_factory):
    """Finished runs by mode and precision, made once."""
    made: dict[tuple[Mode, str], Path] = {}

    def get(mode: Mode, precision: str) -> Path:
        if (mode, precision) not in made:
            folder = tmp_path_factory.mktemp("begun") / f"{mode[0]}"
            made[mode, precision] = begin(pair, folder / "run", mode, f"train.precision={precision}")
        return made[mode, precision]

    return get


TWO = {"ddp": ("ddp", False), "zero0": (0, False), "zero1": (1, False), "zero2": (2, False), "zero3": (3, False)}
ONE = {"plain": ("ddp", True), "zero2-alone": (2, True), "zero3-alone": (3, True)}
ALL = {**TWO, **ONE}
# Each mode is left and entered; each pair of numbers of processes and each pair of layouts occurs.
WAYS = [
    ("zero2", "zero2-alone"),
    ("zero2-alone", "zero2"),
    ("zero2", "zero3"),
    ("zero3", "zero3-alone"),
    ("zero3-alone", "zero1"),
    ("zero3", "zero2"),
    ("zero3", "ddp"),
    ("ddp", "zero3"),
    ("plain", "zero2"),
    ("zero1", "plain"),
    ("zero0", "plain"),
    ("plain", "zero0"),
    ("zero2", "zero2"),
    ("zero3", "zero3"),
]


@pytest.mark.parametrize(("left", "entered"), WAYS, ids=[f"{a}-to-{b}" for a, b in WAYS])
def test_it_goes_on_in_another_mode_or_world(pair, begun, tmp_path, left, entered):
    whole = begun(ONE["plain"], "fp32")
    run = rewound(begun(ALL[left], "fp32"), tmp_path / "run")
    mode, alone = ALL[entered]
    pair(pipeline.finetune(run, *COMMON, "train.precision=fp32", *deepspeed(mode, tmp_path)), alone=alone)
    assert "going on from the checkpoint at step 2 of 4" in pair.log.read_text().splitlines()[-200:].__str__()
    rows, expected = ([r for r in pipeline.rows(p / "metrics.jsonl") if "loss" in r] for p in (run, whole))
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in expected], rel=1e-6)
    assert [r["grad_norm"] for r in rows] == pytest.approx([r["grad_norm"] for r in expected], rel=1e-5)
    # As in the parity gate; without the moments or the step counter it would be 1e-3.
    assert pipeline.largest_difference(run, whole) < 1e-5
    if left == entered:
        # Nothing is summed in another order: bit for bit.
        assert pipeline.largest_difference(run, begun(ALL[left], "fp32")) == 0
