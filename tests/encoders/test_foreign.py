"""Towers of transformers and open_clip give here what they give there."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from torch import Tensor, nn

from mmkit.encoders import load_encoder, save_encoder, to_siglip
from mmkit.encoders.foreign import timm_state
from mmkit.errors import InputError

from .helpers import tiny_encoder

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
MLP: dict[str, Any] = {**SIZES, "intermediate_size": 100}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 50,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def siglip_vision(**more: Any) -> nn.Module:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**{**MLP, **more}))


HUGGING_FACE: dict[str, Any] = {
    "clip-vision": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**MLP)),
    "clip": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(vision_config={**MLP, "hidden_act": "gelu"}, text_config=TEXT, projection_dim=8)
    ),
    "siglip-vision": siglip_vision,
    "siglip-no-head": lambda: siglip_vision(vision_use_head=False, hidden_act="gelu"),
    "siglip": lambda: transformers.SiglipModel(transformers.SiglipConfig(vision_config=MLP, text_config=TEXT)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)),
    "dinov2-swiglu": lambda: transformers.Dinov2Model(transformers.Dinov2Config(use_swiglu_ffn=True, **SIZES)),
    "dinov2-registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(num_register_tokens=2, **SIZES)
    ),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(layer_norm_eps=1e-6, **MLP)),
    "vit-no-bias": lambda: transformers.ViTModel(transformers.ViTConfig(layer_norm_eps=1e-6, qkv_bias=False, **MLP)),
}


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with weights that matter everywhere: new models have zero biases and tiny class tokens."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_huggingface_towers(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = shaken(HUGGING_FACE[name]())
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    encoder = load_encoder(f"hf:{tmp_path / 'model'}")
    with torch.no_grad():
        out = getattr(model, "vision_model", model)(pixel_values=pixels(), output_hidden_states=True)
        pooled = out.pooler_output
        if name.startswith("vit"):
            pooled = out.last_hidden_state[:, 0]  # before the tanh pooler
        elif pooled is None:
            pooled = out.last_hidden_state.mean(1)
        torch.testing.assert_close(encoder(pixels()), pooled, rtol=0, atol=1e-5)
        hidden = out.hidden_states[-2][:, encoder.num_prefix_tokens :]
        torch.testing.assert_close(encoder.tokens(pixels(), -2), hidden, rtol=0, atol=1e-5)
        # What was opened can be saved as mmkit's own folder, which timm opens.
        again = load_encoder(save_encoder(encoder, tmp_path / "saved"))
        assert torch.equal(again(pixels()), encoder(pixels()))
    assert not encoder.training


def test_pixel_statistics_come_from_the_folder_or_the_family(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    siglip_vision().save_pretrained(tmp_path)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING, logger="mmkit"):
        assert load_encoder(f"hf:{tmp_path}").mean == (0.5, 0.5, 0.5)
    assert "no preprocessor_config.json" in caplog.text
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    encoder = load_encoder(f"hf:{tmp_path}")
    assert (encoder.mean, encoder.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_half_precision_stays_and_published_names_are_found(tmp_path: Path) -> None:
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}")
    assert encoder.architecture == "vit_small_patch14_dinov2"
    assert next(encoder.parameters()).dtype == torch.bfloat16


def test_vits_epsilon_is_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformers.ViTModel(transformers.ViTConfig(**MLP)).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="mmkit"):
        load_encoder(f"hf:{tmp_path}")
    assert "epsilon 1e-12" in caplog.text


def test_names_of_older_releases_mean_the_same() -> None:
    model = transformers.ViTModel(transformers.ViTConfig(**MLP), add_pooling_layer=False)
    now = timm_state(model.state_dict())
    older = {
        ".attention.q_proj": ".attention.attention.query",
        ".attention.k_proj": ".attention.attention.key",
        ".attention.v_proj": ".attention.attention.value",
        ".attention.o_proj": ".attention.output.dense",
        ".mlp.fc1": ".intermediate.dense",
        ".mlp.fc2": ".output.dense",
    }
    state = {}
    for name, value in model.state_dict().items():
        for new, old in older.items():
            name = name.replace(new, old)
        state[name.replace("layers.", "encoder.layer.", 1) if name.startswith("layers.") else name] = value
    assert state.keys() != model.state_dict().keys()
    then = timm_state(state)
    assert then.keys() == now.keys() and all(torch.equal(then[name], now[name]) for name in now)


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    transformers.BertModel(
        transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, vocab_size=9)
    ).save_pretrained(tmp_path / "bert")
    siglip_vision(hidden_act="relu").save_pretrained(tmp_path / "relu")  # type: ignore[operator]
    for source, message in (
        (f"hf:{tmp_path / 'nothing'}", "cannot be opened"),
        (f"hf:{tmp_path / 'bert'}", "no tower that mmkit can read: bert"),
        (f"hf:{tmp_path / 'relu'}", "activation 'relu' is none of gelu"),
        ("open_clip:ViT-B-16", "write open_clip:MODEL:TAG"),
        ("open_clip:ViT-B-99:openai", "cannot be opened"),
        ("open_clip:ViT-B-16:nowhere", "cannot be opened"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load_encoder(source)
        assert "\n" not in str(caught.value)


VISION = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "head_width": 16}
TIMM_VISION = {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear"}
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "plain": {"vision_cfg": VISION},
    "quickgelu": {"vision_cfg": VISION, "quick_gelu": True},
    "layerscale-mlp": {"vision_cfg": {**VISION, "ls_init_value": 0.3, "mlp_ratio": 2.5}},
    "clipa": {"vision_cfg": {**VISION, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}},
    "mean-of-normed": {"vision_cfg": {**VISION, "pool_type": "avg"}},
    "epsilon": {"vision_cfg": {**VISION, "norm_kwargs": {"eps": 1e-6}}},
    "timm": {"vision_cfg": TIMM_VISION},
    "timm-projecting": {"vision_cfg": {**TIMM_VISION, "timm_proj": None}},
}


def open_clip_model(folder: Path, name: str, config: dict[str, Any]) -> Any:
    """A new open_clip model in a file; its config becomes known to open_clip under the name."""
    text = {"context_length": 8, "vocab_size": 60, "width": 16, "heads": 2, "layers": 1}
    (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 24, "text_cfg": text, **config}))
    open_clip.add_model_config(folder / f"{name}.json")
    model = shaken(open_clip.create_model(name))
    torch.save(model.state_dict(), folder / "weights.pt")
    return model


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip_towers(tmp_path: Path, name: str) -> None:
    model = open_clip_model(tmp_path, f"mmkit-{name}", OPEN_CLIP[name])
    encoder = load_encoder(f"open_clip:mmkit-{name}:{tmp_path / 'weights.pt'}")
    x = torch.randn(2, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = encoder(x)
        if name == "timm":
            projected = model.visual.head(features)
        elif name == "timm-projecting":
            projected = model.visual.trunk.head(features)
        else:
            projected = features @ model.visual.proj
        torch.testing.assert_close(projected, model.encode_image(x), rtol=0, atol=1e-5)
        assert torch.equal(load_encoder(save_encoder(encoder, tmp_path / "saved"))(x), features)
    assert encoder.mean == open_clip.OPENAI_DATASET_MEAN


def test_open_clip_towers_that_are_no_vit_are_refused(tmp_path: Path) -> None:
    open_clip_model(tmp_path, "mmkit-rn", {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}})
    with pytest.raises(InputError, match="ModifiedResNet"):
        load_encoder(f"open_clip:mmkit-rn:{tmp_path / 'weights.pt'}")


def test_an_exported_siglip_tower_comes_back(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    to_siglip(encoder).save_pretrained(tmp_path)
    back = load_encoder(f"hf:{tmp_path}")
    with torch.no_grad():
        torch.testing.assert_close(back(pixels()), encoder(pixels()), rtol=0, atol=1e-6)
