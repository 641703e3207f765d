"""ZeRO-2 and ZeRO-3 on two gloo processes give the product of one process, stop and go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pipeline
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

import mmkit
from mmkit.recipes import recipe_folders

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed on CPUs and CUDA do not mix in one environment"),
]


def settings(stage: int, folder: Path) -> str:
    """The shipped settings, or the least that make the stage where none are shipped."""
    if (recipe_folders()["deepspeed"] / f"zero{stage}.json").is_file():
        return f"zero{stage}"
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return str(path)


def rewind(run: Path) -> None:
    """Make a finished run look as if it had been killed after its last checkpoint but one."""
    shutil.rmtree(run / "model")
    # The last one is that of the last step, after which there is nothing left to train.
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    state = pipeline.manifest(run)
    (run / "manifest.json").write_text(json.dumps({**state, "status": "running"}))


@pytest.fixture(scope="module")
def reference() -> Path:
    """Five steps of fine-tuning on one process, without DeepSpeed."""
    folder = pipeline.root() / "zero-reference"
    assert pipeline.mmkit(*pipeline.finetune(folder, "train.steps=5", "train.micro_batch_size=2")) == 0
    return folder


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_equals_one_process_and_resumes(tmp_path, reference, stage):
    run = tmp_path / f"zero{stage}"
    arguments = pipeline.finetune(run, "train.steps=5", "train.micro_batch_size=2", "train.checkpoint_every=3")
    arguments.append(f"train.deepspeed={settings(stage, tmp_path)}")
    if stage == 2:  # as the recipe's head says; the other launches go through torchrun, which starts faster
        launch = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "29731"]
        done = pipeline.python(*launch, "--module", "mmkit", *arguments, DS_ACCELERATOR="cpu")
    else:
        done = pipeline.torchrun(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert pipeline.losses(run) == pytest.approx(pipeline.losses(reference), abs=1e-4)
    norms = [[row["grad_norm"] for row in pipeline.rows(r / "metrics.jsonl")] for r in (run, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert pipeline.largest_difference(run, reference) < 1e-4
    model = AutoModelForImageTextToText.from_pretrained(run / "model")
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    picture = Image.open(pipeline.pictures()[0])
    question = ["What colour is it?"]
    assert mmkit.load(run).predict([picture], question) == mmkit.load(reference).predict([picture], question)

    shutil.copytree(run / "model", tmp_path / "straight" / "model")
    rewind(run)
    done = pipeline.torchrun(*arguments)
    assert done.returncode == 0 and "going on from the checkpoint at step 3 of 5" in done.stderr, done.stderr[-3000:]
    assert [row["step"] for row in pipeline.rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert pipeline.largest_difference(run, tmp_path / "straight") < 1e-6


def test_zero3_trains_superclass_with_validation(tmp_path):
    # The head's weights are read outside their module, and one rank has fewer validation pictures than the other.
    world = pipeline.root() / "world"
    common = ["train.steps=2", "train.micro_batch_size=2", "train.val_every=2", "train.val_batches=1", "train.checkpoint_every=1"]
    common += [f"data.val={world / 'captions_heldout.json'}", f"data.val_image_root={world / 'images' / 'heldout'}"]
    # Monitors read the weights outside the engine's own calls.
    labelled = [f"monitor.knn_{part}={world / f'probe_{file}.jsonl'}" for part, file in (("train", "train"), ("test", "heldout"))]
    common += [*labelled, "monitor.label=shape", "monitor.every=2", f"monitor.images=[{pipeline.pictures()[0]}]"]
    assert pipeline.mmkit(*pipeline.superclass(tmp_path / "one", *common)) == 0
    arguments = pipeline.superclass(tmp_path / "two", *common, f"train.deepspeed={settings(3, tmp_path)}")
    done = pipeline.torchrun(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert pipeline.largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5
    for key in ("val_recall@10", "knn_accuracy"):
        one, two = (next(r for r in pipeline.rows(tmp_path / n / "metrics.jsonl") if key in r) for n in ("one", "two"))
        assert two == pytest.approx(one, abs=1e-4)
    # The IDF counts are state: resumed, the second step sees the same weights.
    shutil.copytree(tmp_path / "two" / "model", tmp_path / "straight" / "model")
    rewind(tmp_path / "two")
    done = pipeline.torchrun(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert pipeline.largest_difference(tmp_path / "two", tmp_path / "straight") < 1e-6


def test_one_process_needs_no_launcher(tmp_path):
    run = tmp_path / "run"
    arguments = pipeline.lora(run, "train.steps=3", "train.checkpoint_every=2", f"train.deepspeed={settings(2, tmp_path)}")
    done = pipeline.python("-m", "mmkit", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    plain = pipeline.lora(tmp_path / "plain", "train.steps=3", "train.checkpoint_every=2")
    assert pipeline.mmkit(*plain) == 0
    assert pipeline.largest_difference(run, tmp_path / "plain") < 1e-5
