"""Every way to tune a LLaVA model, through the real command line: what moves, going on after a stop, and the product."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch
from PIL import Image
from transformers import SiglipVisionModel

import mmkit
from mmkit.models.llava import load_mllm, save_mllm
from mmkit.training import loop
from tests import pipeline
from tests.training.test_stages import stop_after

LORA = ["tune=lora", "lora.r=4", "lora.alpha=8"]
MODES = {
    "projector": ["tune=projector"],
    "full": ["tune=full"],
    "lora": LORA,
    "dora": [*LORA, "lora.dora=true"],
    "qlora": [*LORA, "lora.quantization=nf4"],
    "projector+encoder": ["tune=projector", "train_encoder=true"],
    "full+encoder": ["tune=full", "train_encoder=true", "encoder_lr=5e-4"],
    "lora+encoder": [*LORA, "train_encoder=true"],
}
NEEDS_BITSANDBYTES = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
ALL = [pytest.param(mode, marks=NEEDS_BITSANDBYTES) if mode == "qlora" else mode for mode in MODES]


def arguments(mode, run, *more):
    return pipeline.finetune(run, *MODES[mode], *more)


def moved(run):
    """Names of the product's tensors that differ from the aligned model's."""
    before, after = pipeline.weights(pipeline.trained("align")), pipeline.weights(run)
    assert before.keys() == after.keys(), "the product is a plain LLaVA folder in every mode"
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("mode", ALL)
def test_a_mode_saves_goes_on_and_loads_for_inference(mode, tmp_path, monkeypatch):
    run, straight = tmp_path / "run", tmp_path / "straight"
    assert pipeline.mmkit(*arguments(mode, run)) == 0
    shutil.move(run, straight)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert pipeline.mmkit(*arguments(mode, run)) == 75
    assert pipeline.mmkit(*arguments(mode, run)) == 0
    assert pipeline.losses(run) == pipeline.losses(straight)
    assert pipeline.largest_difference(run, straight) == 0.0

    names = moved(run)
    language = {n for n in names if "language_model" in n or "lm_head" in n}
    assert {n for n in names if "multi_modal_projector" in n}
    assert bool({n for n in names if "vision_tower" in n}) == mode.endswith("+encoder")
    if mode.startswith("projector"):
        assert not language
    elif mode.startswith("full"):
        assert any("embed_tokens" in n for n in language)
    else:
        # Linear layers inside the blocks and nothing else.
        assert language and all(n.endswith("_proj.weight") for n in language)
    answers = mmkit.load(str(run)).predict([Image.new("RGB", (32, 32), "red")], ["What is this?"], max_new_tokens=4)
    assert len(answers) == 1


def test_a_trained_encoder_keeps_what_has_no_effect_as_it_was(tmp_path):
    # Feature layer -2 of two blocks: the second block and the final norm are not read.
    assert pipeline.mmkit(*arguments("full+encoder", tmp_path / "run", "train.weight_decay=0.5")) == 0
    tower = {n for n in moved(tmp_path / "run") if "vision_tower" in n}
    assert any("layers.0" in n for n in tower) and any("patch_embedding" in n for n in tower)
    assert not any("layers.1" in n or "post_layernorm" in n for n in tower)


def test_a_trained_encoder_gives_other_features_after_loading(tmp_path):
    run = tmp_path / "run"
    assert pipeline.mmkit(*arguments("full+encoder", run)) == 0
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before, after = (
            load_mllm(folder / "model")[0].model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
            for folder in (pipeline.trained("align"), run)
        )
    assert not torch.allclose(before, after, atol=1e-5)


@NEEDS_BITSANDBYTES
def test_quantised_adapters_are_merged_into_the_weights_before_quantisation(tmp_path):
    # No step: the product must be the parent, and not what 4 bits leave of it.
    assert pipeline.mmkit(*arguments("qlora", tmp_path / "run", "train.steps=0")) == 0
    assert moved(tmp_path / "run") == set()


@NEEDS_BITSANDBYTES
def test_quantised_training_sees_quantised_weights(tmp_path):
    exact, coarse = tmp_path / "exact", tmp_path / "coarse"
    assert pipeline.mmkit(*arguments("lora", exact, "train.steps=1", "lora.dropout=0")) == 0
    assert pipeline.mmkit(*arguments("qlora", coarse, "train.steps=1", "lora.dropout=0")) == 0
    assert pipeline.losses(exact) != pipeline.losses(coarse)
    assert pipeline.losses(exact) == pytest.approx(pipeline.losses(coarse), rel=0.05)


def test_learning_rates_of_projector_and_encoder_are_their_own(tmp_path):
    slow = ["projector_lr=1e-9", "encoder_lr=1e-9", "train.steps=1", "train.weight_decay=0"]
    assert pipeline.mmkit(*arguments("full+encoder", tmp_path / "run", *slow)) == 0
    before, after = pipeline.weights(pipeline.trained("align")), pipeline.weights(tmp_path / "run")
    step = {
        part: max(float((before[n] - after[n]).abs().max()) for n in before if part in n)
        for part in ("multi_modal_projector", "vision_tower", "language_model")
    }
    assert step["multi_modal_projector"] < 1e-7 and step["vision_tower"] < 1e-7
    # AdamW's first step is about lr in every coordinate.
    assert step["language_model"] > 5e-4


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["encoder_lr=1e-5"], "encoder_lr belongs to train_encoder=true"),
        (["tune=full", "lora.r=4"], "lora settings belong to tune=lora, not to full"),
        (
            ["tune=full", "batching.kind=packed", "batching.max_tokens=2000", "train.micro_batch_size=2"],
            "batching.max_tokens in place of",
        ),
        (["train.val_every=2"], "data.val (what to validate on) and train.val_every (how often) go together"),
        (["liger=true"], "liger's kernels need a GPU"),
    ],
)
def test_settings_without_effect_are_refused(keys, message, tmp_path, capsys):
    if message.startswith("liger") and torch.cuda.is_available():
        pytest.skip("tells of a machine without a GPU")
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "run", *keys)) == 2
    assert message in capsys.readouterr().err


def test_checkpointing_changes_no_loss_and_keeps_a_frozen_tower_without_a_graph(tmp_path, monkeypatch):
    seen = []
    forward = SiglipVisionModel.forward

    def looking(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        seen.append(out.last_hidden_state.requires_grad)
        return out

    monkeypatch.setattr(SiglipVisionModel, "forward", looking)
    for mode in ("projector", "lora"):
        found = {}
        for on in ("true", "false"):
            run = tmp_path / f"{mode}-{on}"
            assert pipeline.mmkit(*arguments(mode, run, f"grad_checkpointing={on}")) == 0
            found[on] = pipeline.losses(run)
        assert found["true"] == pytest.approx(found["false"], abs=1e-6)
    assert seen and not any(seen)


@pytest.mark.parametrize("mode", ["projector", "full", "lora"])
def test_what_trains_is_fp32_whatever_the_model_was_stored_in(mode, tmp_path, monkeypatch):
    parent = tmp_path / "parent"
    shutil.copytree(pipeline.trained("align"), parent)
    model, processor, meta = load_mllm(parent / "model")
    save_mllm(model.to(torch.bfloat16), processor, parent / "model", meta=meta)
    seen = {}
    begin = loop._begin

    def looking(stage, *rest):
        named = stage.objective.named_parameters()
        seen.update({name: p.dtype for name, p in named if p.requires_grad})
        return begin(stage, *rest)

    monkeypatch.setattr(loop, "_begin", looking)
    for precision in ("bf16", "fp32"):
        run = tmp_path / precision
        assert pipeline.mmkit(*arguments(mode, run, f"model={parent}", f"train.precision={precision}", "train.steps=1")) == 0
        assert seen and set(seen.values()) == {torch.float32}


def test_more_tokens_than_positions_are_refused_at_the_start(tmp_path, capsys):
    assert pipeline.mmkit(*arguments("full", tmp_path / "run", "max_length=1024")) == 2
    assert "max_length 1024 is more than the language model's 512 positions" in capsys.readouterr().err


def test_a_frozen_language_model_with_dropout_recomputes_and_drops_nothing(tmp_path):
    found = {}
    for on in ("true", "false"):
        run = tmp_path / on
        assert pipeline.mmkit(*pipeline.align(run, "llm.config.attention_dropout=0.5", f"grad_checkpointing={on}")) == 0
        found[on] = pipeline.losses(run)
    # Without checkpointing the frozen model is in eval mode, where dropout is off.
    assert found["true"] == pytest.approx(found["false"], abs=1e-5)
