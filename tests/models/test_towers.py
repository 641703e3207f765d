"""Vision towers of transformers compute what the encoders they were made from compute, hidden state by hidden state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from encoders.helpers import pictures, tiny_encoder
from encoders.test_foreign import HUGGING_FACE, OPEN_CLIP, SIZES, open_clip_model, shaken
from torch import Tensor, nn

from mmkit.encoders import VisionEncoder, build_encoder, load_encoder
from mmkit.encoders.vit import at_size
from mmkit.errors import InputError
from mmkit.models.timm_tower import check_wrapped
from mmkit.models.towers import idle_blocks, passed_through, prefix_tokens, vision_tower

NATIVE: dict[str, Any] = {"layout": "native"}
# What a timm ViT can be, and the class of transformers that has its layout.
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "superclass": ({}, "SiglipVisionModel"),
    "layer scale without class token": ({"init_values": 0.1}, "SiglipVisionModel"),
    "siglip's pooling": ({"global_pool": "map"}, "SiglipVisionModel"),
    "norm after pooling": ({"fc_norm": True}, "SiglipVisionModel"),
    "no qkv bias": ({"qkv_bias": False}, "SiglipVisionModel"),
    "clip": ({**NATIVE, "pre_norm": True}, "CLIPVisionModel"),
    "clip with quick gelu": ({**NATIVE, "pre_norm": True, "act_layer": "quick_gelu"}, "CLIPVisionModel"),
    "clip with layer scale": ({**NATIVE, "pre_norm": True, "init_values": 0.1}, "CLIPVisionModel"),
    "clip, mean of tokens": ({**NATIVE, "pre_norm": True, "global_pool": "avg", "fc_norm": True}, "CLIPVisionModel"),
    "dinov2": ({**NATIVE, "init_values": 0.1}, "Dinov2Model"),
    "augreg": (NATIVE, "Dinov2Model"),
    "deit-3, class token without position": ({**NATIVE, "no_embed_class": True, "init_values": 0.1}, "Dinov2Model"),
    "dinov2 without qkv bias": ({**NATIVE, "qkv_bias": False}, "Dinov2Model"),
}


def hidden_states(tower: nn.Module, pixels: Tensor) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        found: tuple[Tensor, ...] = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    return found


def block_outputs(encoder: VisionEncoder, pixels: Tensor) -> list[Tensor]:
    """What every block of a timm ViT gives, by hooks: no code of mmkit's stands between."""
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in encoder.backbone.blocks]
    with torch.inference_mode():
        encoder.backbone.forward_features(pixels)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_block_of_a_timm_vit(name: str) -> None:
    arguments, kind = LAYOUTS[name]
    encoder = tiny_encoder(**arguments)
    shaken(encoder.backbone)
    tower = vision_tower(encoder)
    assert type(tower).__name__ == kind and not tower.training
    assert prefix_tokens(tower.config) == encoder.num_prefix_tokens
    pixels = encoder.normalise(pictures())
    states, blocks = hidden_states(tower, pixels), block_outputs(encoder, pixels)
    assert len(states) == len(blocks) + 1
    for state, block in zip(states[1:], blocks, strict=True):
        torch.testing.assert_close(state, block, rtol=0, atol=2e-6)
    # What LLaVA reads: the last block but one, prefix tokens dropped.
    torch.testing.assert_close(states[-2][:, encoder.num_prefix_tokens :], encoder.tokens(pictures(), -2), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", [n for n in HUGGING_FACE if "registers" not in n and not n.startswith("vit")])
def test_a_hugging_face_tower_comes_back_in_its_own_class(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = shaken(HUGGING_FACE[name]())
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    tower = vision_tower(load_encoder(f"hf:{tmp_path}"))
    original = getattr(model, "vision_model", model)
    # The same class, so that vLLM and others know it.
    assert type(tower).__name__ == type(original).__name__
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(hidden_states(tower, pixels), hidden_states(original, pixels), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    # Weight for weight, but for SigLIP's pooling head and DINOv2's mask token, which give LLaVA nothing.
    kept, were = tower.state_dict(), original.state_dict()
    assert all(torch.equal(value, were[key]) for key, value in kept.items())
    assert all(key.startswith("head.") or "mask_token" in key for key in were.keys() - kept.keys())


@pytest.mark.parametrize("bias", [True, False])
def test_googles_vit_is_dinov2_without_layer_scale(tmp_path: Path, bias: bool) -> None:
    sizes = {**SIZES, "intermediate_size": 96, "layer_norm_eps": 1e-6, "qkv_bias": bias}
    model = shaken(transformers.ViTModel(transformers.ViTConfig(**sizes)))
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    tower = vision_tower(load_encoder(f"hf:{tmp_path}"))
    assert type(tower).__name__ == "Dinov2Model"
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(hidden_states(tower, pixels), hidden_states(model, pixels), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in OPEN_CLIP if not n.startswith("timm")])
def test_open_clip_towers(tmp_path: Path, name: str) -> None:
    model = open_clip_model(tmp_path, f"mmkit-tower-{name}", OPEN_CLIP[name])
    encoder = load_encoder(f"open_clip:mmkit-tower-{name}:{tmp_path / 'weights.pt'}")
    pixels = torch.randn(2, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(1))
    theirs: list[Tensor] = []
    for block in model.visual.transformer.resblocks:
        block.register_forward_hook(lambda _, __, out: theirs.append(out))
    with torch.inference_mode():
        model.encode_image(pixels)
    states = hidden_states(vision_tower(encoder), pixels)
    for state, block in zip(states[1:], theirs, strict=True):
        torch.testing.assert_close(state, block, rtol=0, atol=1e-5)
    assert encoder.mean == open_clip.OPENAI_DATASET_MEAN


def test_a_gated_mlp_keeps_its_width() -> None:
    sizes = {"embed_dim": 48, "depth": 3, "num_heads": 3}
    encoder = build_encoder("vit_giant_patch14_dinov2", image_size=28, layout="native", model_args=sizes, seed=0).eval()
    tower = vision_tower(encoder)
    assert tower.config.use_swiglu_ffn
    pixels = encoder.normalise(pictures(size=28))
    torch.testing.assert_close(hidden_states(tower, pixels)[-2], block_outputs(encoder, pixels)[-2], rtol=0, atol=1e-6)


def test_weights_are_copies_in_the_encoders_dtype() -> None:
    encoder = tiny_encoder(**NATIVE).to(torch.bfloat16)
    tower = vision_tower(encoder)
    assert tower.dtype == torch.bfloat16
    before = encoder(pictures())
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.zero_()
    assert torch.equal(encoder(pictures()), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"reg_tokens": 4},
            "4 register tokens, and LlavaForConditionalGeneration drops one class token",
        ),
        ({**NATIVE, "reg_tokens": 2}, "2 register tokens"),
        ({"qk_norm": True}, "no class of transformers computes this VisionTransformer"),
        ({"pre_norm": True}, "no class of transformers computes"),
        ({"scale_mlp_norm": True}, "no class of transformers computes"),
        ({**NATIVE, "act_layer": "mish"}, "no class of transformers computes"),
        ({**NATIVE, "mlp_ratio": 2.5}, "2.5 times as wide .* whole numbers only"),
    ],
)
def test_what_no_class_computes_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        vision_tower(tiny_encoder(**arguments))


def test_dinov2_with_registers_is_refused(tmp_path: Path) -> None:
    HUGGING_FACE["dinov2-registers"]().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="2 register tokens"):
        vision_tower(load_encoder(f"hf:{tmp_path}"))


@pytest.mark.parametrize("architecture", ["resnet10t", "convnext_atto"])
def test_convolutional_towers_give_their_last_map(architecture: str) -> None:
    encoder = build_encoder(architecture, image_size=64, seed=0).eval()
    expected = encoder.tokens(pictures(size=64))
    tower = vision_tower(encoder)
    assert (tower.config.hidden_size, tower.config.patch_size, tower.config.image_size) == (encoder.width, 32, 64)
    with torch.inference_mode():
        found = tower(pixel_values=encoder.normalise(pictures(size=64))).last_hidden_state
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected)


def test_towers_that_the_wrapper_cannot_serve_are_refused() -> None:
    eva = build_encoder("eva02_tiny_patch14_224", image_size=28, layout="native", seed=0)
    with pytest.raises(InputError, match=r"this Eva, nor reads what its last layer gives \(\[1, 5, 192\]"):
        vision_tower(eva)
    with pytest.raises(InputError, match="map of 3 x 3 does not cover 72 pixels evenly"):
        vision_tower(build_encoder("resnet10t", image_size=72, seed=0))


def test_the_wrappers_one_layer_is_said_plainly() -> None:
    check_wrapped("linear", -1)
    for projector, layer in (("mlp2x_gelu", -2), ("pixel_shuffle", -1)):
        with pytest.raises(InputError, match=r"hidden states are maps, not tokens; use feature_layer: -1"):
            check_wrapped(projector, layer)


@pytest.mark.parametrize("arguments", [{}, NATIVE, {**NATIVE, "no_embed_class": True}])
def test_another_picture_size_interpolates_the_positions(arguments: dict[str, Any]) -> None:
    """The same as timm's own resampling on building, whose weights `init` copies for pretraining and fine-tuning."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    encoder = tiny_encoder(**arguments)
    table = encoder.backbone.pos_embed.detach().clone()
    prefix = 0 if arguments.get("no_embed_class") else encoder.num_prefix_tokens
    larger = at_size(encoder, 48)
    assert (larger.image_size, larger.num_tokens, larger.model_args["img_size"]) == (48, 36, 48)
    expected = resample_abs_pos_embed(table, new_size=[6, 6], old_size=[4, 4], num_prefix_tokens=prefix, antialias=True)
    assert torch.equal(larger.backbone.pos_embed, expected)
    tower = vision_tower(larger)
    states = hidden_states(tower, larger.normalise(pictures(size=48)))
    assert tower.config.image_size == 48
    torch.testing.assert_close(states[-2][:, larger.num_prefix_tokens :], larger.tokens(pictures(size=48), -2), rtol=0, atol=2e-6)


def test_sizes_that_do_not_fit_are_refused() -> None:
    encoder = tiny_encoder()
    assert at_size(encoder, 32) is encoder
    with pytest.raises(InputError, match="36 pixels are no whole number of patches of 8"):
        at_size(encoder, 36)
    # A convolution takes any size, and has more tokens for it.
    assert at_size(build_encoder("resnet10t", image_size=64, seed=0), 96).num_tokens == 9


@pytest.mark.parametrize("layer", [-1, -2, 1, [-2, 1], -4])
@pytest.mark.parametrize("name", ["superclass", "clip", "dinov2"])
def test_blocks_behind_the_features_are_not_computed(name, layer):
    settings, _ = LAYOUTS[name]
    tower = vision_tower(tiny_encoder(**settings))
    count = tower.config.num_hidden_layers
    assert count == 3
    used = [layer] if isinstance(layer, int) else layer
    blocks = next(list(m) for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    ran: list[int] = []
    for number, block in enumerate(blocks):
        next(m for m in block.modules() if isinstance(m, nn.Linear)).register_forward_hook(lambda *_, n=number: ran.append(n))
    pixels = torch.randn(2, 3, tower.config.image_size, tower.config.image_size)
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True).hidden_states
        ran.clear()
        with passed_through(idle_blocks(tower, layer)):
            found = tower(pixels, output_hidden_states=True).hidden_states
    assert all(torch.equal(found[n], expected[n]) for n in used) and len(found) == len(expected)
    assert ran == list(range({-1: 3, -2: 2, 1: 1, -4: 0}.get(layer if isinstance(layer, int) else 0, 2)))
    # As it was: whoever asks for other states gets them.
    with torch.no_grad():
        again = tower(pixels, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_a_wrapped_tower_computes_all_of_itself():
    assert idle_blocks(vision_tower(build_encoder("resnet10t", image_size=64, seed=0)), -1) == []
