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
from PIL import Image

import mmkit
from mmkit.distributed.pieces import Saved

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


@pytest.mark.parametrize(("left", "entered"), [("zero2", "zero3"), ("zero0", "zero2"), ("zero3", "zero0"), ("zero1", "plain")])
def test_fp32_weights_and_moments_survive_a_change_of_mode_in_bf16(pair, begun, tmp_path, left, entered):
    """The weights that compute are bf16; from them alone the masters would come back rounded, 1e-3 off.

    Losses in bf16 agree to its three digits only, so the checkpoint itself is compared: what the next mode writes after
    reading it must be what it read. No step lies between: the run ends where the checkpoint is.
    """
    run = rewound(begun(ALL[left], "bf16"), tmp_path / "run")
    before = Saved(run / "checkpoints" / "step-00000002")
    mode, alone = ALL[entered]
    call = {"words": pipeline.finetune(run, *COMMON, "train.precision=bf16", *deepspeed(mode, tmp_path))[1:], "run": str(run)}
    pair.call("driven:copy_checkpoint", **call, out=str(tmp_path / "again"), alone=alone)
    after = Saved(tmp_path / "again")
    assert before.names == after.names and before.kinds == after.kinds == {"weight", "exp_avg", "exp_avg_sq"}
    assert before.step is not None and after.step is not None and float(before.step) == float(after.step) == 2
    for name in before.names:
        size = sum(source.size for _, source in before._pieces["weight", name])
        for kind in before.kinds:
            assert torch.equal(before.read(kind, name, 0, size), after.read(kind, name, 0, size)), (kind, name)


def tuned(kind: str, run: Path, *more: str) -> list[str]:
    """Arguments of a run that trains the projector, LoRA layers or all."""
    return {"projector": pipeline.align, "lora": pipeline.lora, "full": pipeline.finetune}[kind](run, *COMMON, *more)


@pytest.mark.parametrize(
    ("kind", "mode"), [("projector", 3), ("lora", 3), ("lora", 2), ("full", 3), ("full", 1), ("full", "ddp")]
)
def test_every_checkpoint_becomes_a_product_without_its_processes(pair, tmp_path, kind, mode):
    run = tmp_path / "run"
    pair(tuned(kind, run, *deepspeed(mode, tmp_path)))
    # The last checkpoint is what the product was made from.
    assert pipeline.mmkit("export", run, tmp_path / "newest" / "model", "--checkpoint", "newest") == 0
    assert pipeline.largest_difference(tmp_path / "newest", run) == 0
    # As of a run that was given up in the middle.
    half = rewound(run, tmp_path / "half")
    assert pipeline.mmkit("export", half, tmp_path / "mid" / "model", "--checkpoint", "2") == 0
    assert pipeline.largest_difference(tmp_path / "mid", run) > 1e-4
    answer = mmkit.load(tmp_path / "mid" / "model").predict([Image.open(pipeline.pictures()[0])], ["What colour is it?"])
    assert len(answer) == 1
    assert pipeline.manifest(half)["status"] == "running"


def test_what_cannot_be_exported_says_why(tmp_path, capsys):
    run = tmp_path / "run"
    assert pipeline.mmkit(*pipeline.align(run, *COMMON)) == 0
    out = tmp_path / "out"

    def refused(*words: str) -> str:
        assert pipeline.mmkit("export", *words) == 2
        return capsys.readouterr().err

    assert "has no checkpoint 3; use newest or one of 2, 4" in refused(run, out, "--checkpoint", "3")
    assert "--format and --checkpoint do not go together" in refused(run, out, "--checkpoint", "2", "--format", "timm")
    assert "is no run" in refused(tmp_path / "none", out, "--checkpoint", "2")
    assert "is in the way" in refused(run, run / "model", "--checkpoint", "2")
    file = run / "checkpoints" / "step-00000002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "is damaged (model.safetensors: content differs" in refused(run, out, "--checkpoint", "2")
    assert not out.exists()
