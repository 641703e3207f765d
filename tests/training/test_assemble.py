"""LLaVA stages from recipes: any encoder, another picture size, other projectors, a projector of another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pipeline
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmkit.encoders import build_encoder, load_encoder, save_encoder

TWO = ["train.steps=2", "train.log_every=2"]


@pytest.fixture(scope="module")
def clip_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder in CLIP's layout, with a mean and deviation of its own."""
    sizes = {"depth": 2, "embed_dim": 32, "num_heads": 2, "pre_norm": True}
    args: dict[str, Any] = {"image_size": 32, "patch_size": 8, "layout": "native", "model_args": sizes, "seed": 3}
    encoder = build_encoder("vit_base_patch16_clip_224", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), **args)
    return save_encoder(encoder.eval(), tmp_path_factory.mktemp("clip") / "encoder")


def meta_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "model" / "mmkit.json").read_text())


def weights(run: Path, part: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_file(run / "model" / "model.safetensors").items() if part in name}


def test_an_encoder_with_a_class_token_through_both_stages(tmp_path: Path, clip_encoder: Path) -> None:
    """CLIP's layout at a larger size: aligned, then tuned from the run, which has to know of the class token again."""
    more = [f"encoder={clip_encoder}", "image_size=48", "feature_layer=-1", *TWO]
    assert pipeline.mmkit(*pipeline.align(tmp_path / "align", *more)) == 0
    tune = pipeline.finetune(tmp_path / "tune", f"model={tmp_path / 'align'}", *TWO)
    assert pipeline.mmkit(*tune) == 0
    for run in ("align", "tune"):
        meta = meta_of(tmp_path / run)
        assert (meta["image_size"], meta["num_image_tokens"], meta["feature_layer"]) == (48, 36, -1)
        assert (meta["mean"], meta["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
        config = AutoModelForImageTextToText.from_pretrained(tmp_path / run / "model").config
        assert config.vision_config.model_type == "clip_vision_model"
        assert (config.vision_config.image_size, config.vision_feature_select_strategy) == (48, "default")
        processor = AutoProcessor.from_pretrained(tmp_path / run / "model")
        assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert meta["tuned"] == ["llm"]
    # The tower in the product is the encoder's, at the new size: nothing of it trains in these two stages.
    tower = AutoModelForImageTextToText.from_pretrained(tmp_path / "tune" / "model").model.vision_tower
    encoder = load_encoder(clip_encoder)
    encoder.backbone.set_input_size(img_size=(48, 48))
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        torch.testing.assert_close(hidden, encoder.tokens(pixels, -1), rtol=0, atol=1e-5)


def test_a_tower_stored_in_halves_is_computed_in_the_llms_dtype(tmp_path: Path, clip_encoder: Path) -> None:
    half = save_encoder(load_encoder(clip_encoder).to(torch.bfloat16), tmp_path / "half")
    assert pipeline.mmkit(*pipeline.align(tmp_path / "align", f"encoder={half}", *TWO)) == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "align" / "model")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # Nothing is lost: the halves are there, in float32.
    patches = load_encoder(half).backbone.patch_embed.proj.weight
    assert torch.equal(model.model.vision_tower.embeddings.patch_embedding.weight, patches.float())


@pytest.mark.parametrize(("projector", "tokens"), [("linear", 16), ("pixel_shuffle", 4)])
def test_other_projectors_train_and_go_on(tmp_path: Path, projector: str, tokens: int) -> None:
    assert pipeline.mmkit(*pipeline.align(tmp_path / "align", f"projector={projector}", *TWO)) == 0
    again = pipeline.finetune(tmp_path / "lora", f"model={tmp_path / 'align'}", "tune=lora", "lora.r=2", "lora.alpha=2", *TWO)
    assert pipeline.mmkit(*again) == 0
    for run in ("align", "lora"):
        meta = meta_of(tmp_path / run)
        assert (meta["projector"], meta["num_image_tokens"]) == (projector, tokens)
    moved = {
        name.partition("projector.")[2]
        for name, value in weights(tmp_path / "align", "projector").items()
        if not torch.equal(value, weights(tmp_path / "lora", "projector")[name])
    }
    every = {"linear_1.weight", "linear_1.bias"}
    if projector == "pixel_shuffle":
        every |= {"linear_2.weight", "linear_2.bias", "layernorm.weight", "layernorm.bias"}
    assert moved == every
    assert pipeline.mmkit("predict", tmp_path / "lora", pipeline.pictures()[0], "--max-new-tokens", "2") == 0


def test_a_projector_of_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = pipeline.trained("align")
    # At a learning rate of nothing: what comes out is what went in.
    more = [f"projector_from={source}", "train.lr=1e-30", "train.weight_decay=0", *TWO]
    assert pipeline.mmkit(*pipeline.align(tmp_path / "taken", *more)) == 0
    before, after = weights(source, "projector"), weights(tmp_path / "taken", "projector")
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    parents = json.loads((tmp_path / "taken" / "manifest.json").read_text())["parents"]
    assert [parent["role"] for parent in parents] == ["encoder", "projector"]
    # A finished run returns at once, so both places that list parents agree.
    assert pipeline.mmkit(*pipeline.align(tmp_path / "taken", *more)) == 0

    # The same shapes throughout: only the fingerprints differ.
    other = tmp_path / "encoder"
    shutil.copytree(pipeline.trained("superclass") / "model", other)
    encoder = load_encoder(other)
    with torch.no_grad():
        encoder.backbone.pos_embed += 1e-3
    save_encoder(encoder, other)
    for change, message in (
        ([f"encoder={other}"], f"trained with encoder {pipeline.trained('superclass')}"),
        (["seed=1"], "trained with llm with random weights"),
        (["feature_layer=-1"], "trained with feature_layer -2, this model has -1"),
        (["image_size=48"], "trained with image_size 32, this model has 48"),
        (["projector=linear"], "trained with projector mlp2x_gelu, this model has linear"),
        ([f"projector_from={pipeline.trained('finetune')}"], "its llm was tuned together with the projector"),
        ([f"projector_from={pipeline.trained('superclass')}"], "this model's kind is 'encoder', not 'mllm'"),
    ):
        capsys.readouterr()
        arguments = [f"projector_from={source}", *change]
        assert pipeline.mmkit(*pipeline.align(tmp_path / "refused", *arguments)) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
        assert not (tmp_path / "refused").exists()


def test_grids_and_sizes_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for change, message in (
        (["projector=pixel_shuffle", "pixel_shuffle=3"], "a grid of 4 x 4 patches cannot be joined by 3 x 3"),
        (["image_size=36"], "36 pixels are no whole number of patches of 8"),
        (["pixel_shuffle=2"], "pixel_shuffle has no effect with projector mlp2x_gelu"),
    ):
        capsys.readouterr()
        assert pipeline.mmkit(*pipeline.align(tmp_path / "run", *change)) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
    capsys.readouterr()
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "run", "image_size=48", "projector=linear")) == 2
    assert "image_size, projector belong to assembling: leave them out with `model`" in capsys.readouterr().err
