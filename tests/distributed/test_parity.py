"""The parity gate: two processes under DDP and ZeRO-0, 1, 2, 3, with and without accumulation, equal one process.

DeepSpeed has lost parts of gradients without an error more than once (facts/performance.md 7), so what is compared is every
step's loss and gradient norm and the weights at the end, of the real stage through the real command line.

Why these tolerances. All is fp32, so what differs is the order of sums. Losses and norms agree to a few units in the seventh
digit. Adam divides a gradient by its own size: where a gradient is as small as its rounding, the first updates are of the size of
the learning rate whatever its sign. An eps of 1e-4, far above rounding and below most gradients here, takes that away and leaves
weights within 1e-5 of each other, a hundredth of one update; a lost micro-batch or a wrong factor moves them by 1e-3.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pipeline
import pytest
import torch
from modes import MODES, deepspeed
from pair import Pair

from mmkit.recipes import recipe_folders

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed on CPUs and CUDA do not mix in one environment"),
]
COMMON = [
    "train.steps=4",
    "train.warmup=2",
    "train.weight_decay=0.1",
    "train.eps=1e-4",
    "train.clip_grad_norm=0.5",
    "track.kind=none",
]


def lora(run: Path, *more: str) -> list[str]:
    """LoRA without dropout, whose draws belong to a process."""
    return pipeline.lora(run, "lora.dropout=0.0", *more)


TUNES: dict[str, Callable[..., list[str]]] = {"full": pipeline.finetune, "lora": lora}


@pytest.fixture(scope="module")
def reference(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One process without DeepSpeed, one piece a step."""
    made: dict[str, Path] = {}

    def run(tune: str) -> Path:
        if tune not in made:
            made[tune] = tmp_path_factory.mktemp("reference") / tune
            pair(TUNES[tune](made[tune], *COMMON), alone=True)
        return made[tune]

    return run


def norms(run: Path) -> list[float]:
    return [row["grad_norm"] for row in pipeline.rows(run / "metrics.jsonl") if "grad_norm" in row]


def assert_equal(run: Path, other: Path, *, weights: float = 1e-5) -> None:
    assert pipeline.losses(run) == pytest.approx(pipeline.losses(other), rel=1e-6)
    assert norms(run) == pytest.approx(norms(other), rel=1e-5)
    assert pipeline.largest_difference(run, other) < weights


@pytest.mark.parametrize("tune", TUNES)
def test_the_reference_clips_learns_and_moves_weights(reference, tune):
    # Otherwise equality would show nothing: clipping below every norm, a falling loss.
    run = reference(tune)
    assert min(norms(run)) > 0.5
    assert pipeline.losses(run)[-1] < pipeline.losses(run)[0]
    assert pipeline.largest_difference(run, pipeline.trained("align")) > 1e-3


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tune", TUNES)
def test_two_processes_equal_one(pair, reference, tmp_path, tune, mode, accumulation):
    size = f"train.micro_batch_size={4 // accumulation}"
    pair(TUNES[tune](tmp_path / "run", *COMMON, size, *deepspeed(mode, tmp_path)))
    assert_equal(tmp_path / "run", reference(tune))


@pytest.mark.parametrize("mode", MODES)
def test_bf16_follows_fp32_in_every_mode(pair, reference, tmp_path, mode):
    """Coarser than above, as bf16's three digits are; a first update half as long, or a decay too many, is still seen."""
    pair(
        pipeline.finetune(
            tmp_path / "run", *COMMON, "train.micro_batch_size=1", "train.precision=bf16", *deepspeed(mode, tmp_path)
        )
    )
    assert pipeline.losses(tmp_path / "run") == pytest.approx(pipeline.losses(reference("full")), rel=2e-3)
    assert norms(tmp_path / "run") == pytest.approx(norms(reference("full")), rel=2e-2)


def test_offloading_equals_one_process_too(pair, reference, tmp_path):
    settings = json.loads((recipe_folders()["deepspeed"] / "zero3-offload.json").read_text())["zero_optimization"]
    pair(pipeline.finetune(tmp_path / "run", *COMMON, "train.micro_batch_size=1", *deepspeed(3, tmp_path, **settings)))
    assert_equal(tmp_path / "run", reference("full"))
    # One line says what a step is; the numbers are held against what DeepSpeed resolved.
    line = "global batch 8 = micro-batch 1 x accumulation 4 x world size 2; gradients clipped at norm 0.5; DeepSpeed ZeRO-3"
    assert line in pair.log.read_text()


def conversations() -> Path:
    """The demo's conversations with a picture (0 to 39), and as many without (40 to 79)."""
    path = pipeline.root() / "world" / "parity.json"
    if not path.exists():
        items = [item for item in json.loads((path.parent / "llava_train.json").read_text()) if "image" in item][:40]
        ask = {"from": "human", "value": "How many colours are there?"}
        answers = [{"from": "gpt", "value": "seven " * (n % 5 + 1)} for n in range(40)]
        text = [{"id": f"only-{n}", "conversations": [ask, answer]} for n, answer in enumerate(answers)]
        path.write_text(json.dumps(items + text))
    return path


# Pieces of 1, 3 and 2 a process, of unlike sizes, as packing gives them. First rank 0 has only text and rank 1 only pictures,
# then the other way round, then no rank has a picture, then pieces of one process differ.
STEPS = [
    {"rows": [*range(40, 46), *range(6)], "sizes": {"1": [12], "2": [6]}},
    {"rows": [*range(6, 12), *range(46, 52)], "sizes": {"1": [12], "2": [1, 3, 2]}},
    {"rows": [*range(52, 64)], "sizes": {"1": [12], "2": [4, 2]}},
    {"rows": [12, 13, 64, 65, 14, 66, 67, 68, 15, 69, 70, 16], "sizes": {"1": [12], "2": [1, 3, 2]}},
    {"rows": [*range(17, 23), *range(70, 76)], "sizes": {"1": [12], "2": [6]}},
]


def driven(pair: Pair, out: Path, mode: str | int, *, tower: bool, alone: bool = False) -> Path:
    """Train through STEPS; a hang shows after half a minute."""
    words = pipeline.finetune(out, *COMMON, f"data.train={conversations()}", "train.micro_batch_size=1")[1:]
    out.mkdir()
    words += deepspeed(mode, out)
    pair.call("driven:drive", words=words, out=str(out), steps=STEPS, tower=tower, alone=alone, timeout=30)
    return out


@pytest.fixture(scope="module")
def one_driven(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """STEPS on one process."""
    made: dict[bool, Path] = {}

    def run(tower: bool) -> Path:
        if tower not in made:
            made[tower] = driven(pair, tmp_path_factory.mktemp("driven") / "run", "ddp", tower=tower, alone=True)
        return made[tower]

    return run


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tower", [False, True], ids=["frozen-tower", "trained-tower"])
def test_ranks_without_pictures_and_changing_numbers_of_pieces(pair, one_driven, tmp_path, tower, mode):
    run, other = driven(pair, tmp_path / "run", mode, tower=tower), one_driven(tower)
    found, expected = (torch.tensor(json.loads((r / "steps.json").read_text()), dtype=torch.float64) for r in (run, other))
    assert torch.allclose(found[:, 0], expected[:, 0], rtol=1e-6, atol=0), (found, expected)
    assert torch.allclose(found[:, 1], expected[:, 1], rtol=1e-5, atol=0), (found, expected)
    assert pipeline.largest_difference(run, other) < 1e-5
    moved = [
        name for name, w in pipeline.weights(pipeline.trained("align")).items() if not torch.equal(w, pipeline.weights(run)[name])
    ]
    assert any("vision_tower" in name for name in moved) == tower
