"""Towers: layout, inputs, tokens, sizes, and what a wrong name or size says."""

from __future__ import annotations

import pytest
import timm
import torch

from mmkit.encoders import build_encoder
from mmkit.encoders.vit import CLIP_MEAN, CLIP_STD, SUPERCLASS_LAYOUT
from mmkit.errors import InputError

from .helpers import pictures, tiny_encoder


def test_superclass_layout_pools_patch_tokens_after_the_norm() -> None:
    encoder, x = tiny_encoder(), pictures()
    tokens = encoder.tokens(x)
    assert tokens.shape == (2, encoder.num_tokens, encoder.width) == (2, 16, 48)
    assert encoder.num_prefix_tokens == 0
    torch.testing.assert_close(encoder(x), tokens.mean(dim=1))
    torch.testing.assert_close(encoder.backbone.norm(encoder.tokens(x, -1)), tokens)


def test_uint8_is_normalised_and_float_is_taken_as_it_is() -> None:
    encoder, x = tiny_encoder(), pictures()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(encoder(x), encoder((x / 255 - mean) / std))


def test_casting_keeps_the_pixel_statistics_exact() -> None:
    encoder = tiny_encoder().to(torch.bfloat16)
    assert encoder.pixel_mean.dtype == torch.float32
    assert encoder.pixel_mean.flatten().tolist() == pytest.approx(CLIP_MEAN, abs=1e-7)
    assert encoder(pictures()).dtype == torch.bfloat16
    assert not any("pixel" in name for name in encoder.state_dict())


def test_layers_count_from_the_end() -> None:
    encoder, x = tiny_encoder(), pictures()
    block = encoder.backbone.blocks[-1]
    torch.testing.assert_close(block(encoder.tokens(x, -2)), encoder.tokens(x, -1))
    for layer in (0, 1, -4):
        with pytest.raises(InputError, match=r"no layer .* tower of 3 blocks"):
            encoder.tokens(x, layer)


def test_native_layout_keeps_the_class_token_out_of_the_patch_tokens() -> None:
    encoder, x = tiny_encoder(layout="native"), pictures()
    assert encoder.num_prefix_tokens == 1
    assert encoder.tokens(x).shape == encoder.tokens(x, -2).shape == (2, 16, 48)
    assert encoder(x).shape == (2, 48)


def test_convolutional_models_keep_their_own_layout() -> None:
    encoder = build_encoder("resnet10t", image_size=64, seed=0).eval()
    assert encoder.tokens(pictures(size=64)).shape == (2, encoder.num_tokens, encoder.width) == (2, 4, 512)
    assert encoder(pictures(size=64)).shape == (2, 512)
    assert encoder.tokens(pictures(size=64), -1).shape == (2, 4, 512)


@pytest.mark.parametrize(
    ("name", "width", "tokens", "millions"),
    [
        ("vit_small_patch16_224", 384, 196, 21.66),
        ("vit_base_patch16_224", 768, 196, 85.80),
        ("vit_large_patch16_224", 1024, 196, 303.30),
        ("vit_large_patch14_224", 1024, 256, 303.18),
    ],
)
def test_sizes_of_the_recipes(name: str, width: int, tokens: int, millions: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **SUPERCLASS_LAYOUT)
    assert (model.num_features, model.patch_embed.num_patches) == (width, tokens)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_seed_fixes_the_weights_and_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    one, two, other = (tiny_encoder(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    x = pictures()
    assert torch.equal(one(x), two(x)) and not torch.equal(one(x), other(x))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    encoder, x = tiny_encoder().train(), pictures()
    gradients = []
    for enable in (False, True):
        encoder.zero_grad()
        encoder.set_grad_checkpointing(enable)
        encoder(x).square().sum().backward()
        gradients.append(encoder.backbone.patch_embed.proj.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(InputError, match="vit_base_patch16_224") as caught:
        build_encoder("vit_base_patch_16_224")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="timm has no model"):
        build_encoder("owner/name")


@pytest.mark.parametrize("wrong", [{"depht": 3}, {"embed_dim": 50, "num_heads": 3}, {"act_layer": torch.nn.GELU}])
def test_arguments_that_do_not_fit_are_one_line(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match="do not fit") as caught:
        tiny_encoder(**wrong)
    assert "\n" not in str(caught.value)
