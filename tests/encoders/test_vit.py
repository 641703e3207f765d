"""Towers: layout, inputs, tokens, sizes, and what a wrong name or size says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkit.encoders import VisionEncoder, build_encoder
from mmkit.encoders.vit import CLIP_MEAN, CLIP_STD
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


# Hierarchical models, a ViT that is not timm's plain one, and their tokens for 64 pixels (Swin: 224).
OTHERS = [
    ("convnext_atto", 64, {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, 4, 32),
    ("swin_tiny_patch4_window7_224", 224, {"depths": [1, 1, 1, 1], "embed_dim": 16, "num_heads": [1, 1, 1, 1]}, 49, 128),
    ("eva02_tiny_patch14_224", 56, {"depth": 2, "embed_dim": 48, "num_heads": 3}, 16, 48),
]


@pytest.mark.parametrize(("name", "size", "args", "tokens", "width"), OTHERS)
def test_other_models_of_timm_give_pooled_features_and_tokens(
    name: str, size: int, args: dict[str, Any], tokens: int, width: int
) -> None:
    encoder, x = build_encoder(name, image_size=size, model_args=args, seed=0).eval(), pictures(size=size)
    assert (encoder.num_tokens, encoder.width) == (tokens, width)
    assert encoder.tokens(x).shape == encoder.tokens(x, -1).shape == (2, tokens, width)
    assert encoder(x).shape == (2, width)
    with pytest.raises(InputError, match="cannot leave patches out"):
        encoder(x, keep=torch.zeros(2, 1, dtype=torch.int64))


def expected_parameters(image: int, patch: int, width: int, layers: int, hidden: int) -> int:
    """Patches with bias, positions, blocks, one norm at the end; no class token and no norm before the blocks."""
    block = 4 * width * width + 2 * width * hidden + 4 * width + 4 * width + hidden + width
    return 3 * patch**2 * width + width + (image // patch) ** 2 * width + layers * block + 2 * width


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize(
    ("name", "width", "layers", "hidden"),
    [
        ("vit_small_patch16_224", 384, 12, 1536),
        ("vit_base_patch16_224", 768, 12, 3072),
        ("vit_large_patch16_224", 1024, 24, 4096),
        ("vit_huge_patch14_224", 1280, 32, 5120),
        ("vit_giant_patch14_224", 1408, 40, 6144),
    ],
)
def test_all_sizes_at_both_patches(name: str, width: int, layers: int, hidden: int, patch: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name, patch_size=patch)
    assert (encoder.width, encoder.num_tokens) == (width, (224 // patch) ** 2)
    assert sum(p.numel() for p in encoder.parameters()) == expected_parameters(224, patch, width, layers, hidden)


def test_sizes_in_the_papers_table() -> None:
    sizes = {(384, 12, 1536, 16): 21.66, (768, 12, 3072, 16): 85.80, (1024, 24, 4096, 16): 303.30, (1024, 24, 4096, 14): 303.18}
    for (width, layers, hidden, patch), millions in sizes.items():
        assert expected_parameters(224, patch, width, layers, hidden) / 1e6 == pytest.approx(millions, abs=0.01)


def explicit_keep(encoder: VisionEncoder, x: Tensor, keep: Tensor) -> Tensor:
    """What a forward pass on chosen patches has to give, picture by picture and without the tower's own forward."""
    vit, rows = encoder.backbone, []
    for picture, kept in zip(vit.patch_embed(encoder.normalise(x)), keep, strict=True):
        prefix = encoder.num_prefix_tokens
        tokens = picture if not prefix else torch.cat([vit.cls_token[0], picture])
        tokens = tokens + vit.pos_embed[0]
        tokens = torch.cat([tokens[:prefix], tokens[prefix:][kept]]).unsqueeze(0)
        for block in vit.blocks:
            tokens = block(tokens)
        tokens = vit.norm(tokens)
        rows.append(tokens[0, 0] if prefix else tokens[0].mean(0))
    return torch.stack(rows)


def chosen(count: int = 2, kept: int = 7, of: int = 16, seed: int = 0) -> Tensor:
    """Indices int64[count, kept] of patches, different for every picture."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(of, generator=generator)[:kept].sort().values for _ in range(count)])


@pytest.mark.parametrize("layout", ["superclass", "native"])
def test_kept_patches_equal_an_explicit_forward_values_and_gradients(layout: str) -> None:
    encoder, x, keep = tiny_encoder(layout=layout), pictures(), chosen()
    twin = copy.deepcopy(encoder)
    torch.testing.assert_close(encoder(x, keep=keep), explicit_keep(twin, x, keep))
    assert not torch.allclose(encoder(x, keep=keep), encoder(x), atol=1e-3)
    encoder(x, keep=keep).square().sum().backward()
    explicit_keep(twin, x, keep).square().sum().backward()
    for (name, one), two in zip(encoder.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)


@pytest.mark.parametrize("layout", ["superclass", "native"])
def test_keeping_all_patches_is_keeping_none_out(layout: str) -> None:
    encoder, x = tiny_encoder(layout=layout), pictures()
    everything = torch.arange(16).expand(2, -1)
    assert torch.equal(encoder(x, keep=everything), encoder(x))


def test_kept_patches_are_forgotten_after_the_call() -> None:
    encoder, x = tiny_encoder(), pictures()
    before = encoder(x)
    encoder(x, keep=chosen())
    assert torch.equal(encoder(x), before)
    with pytest.raises(RuntimeError):
        encoder(x, keep=chosen() + 100)
    assert torch.equal(encoder(x), before) and encoder.tokens(x).shape == (2, 16, 48)


def test_keep_works_under_checkpointing_and_autocast() -> None:
    encoder, x, keep = tiny_encoder().train(), pictures(), chosen()
    encoder(x, keep=keep).square().sum().backward()
    plain = encoder.backbone.pos_embed.grad.clone()
    encoder.zero_grad()
    encoder.set_grad_checkpointing(True)
    encoder(x, keep=keep).square().sum().backward()
    torch.testing.assert_close(encoder.backbone.pos_embed.grad, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(encoder(x, keep=keep).float(), encoder(x, keep=keep.clone()).float())
        assert encoder(x, keep=keep).shape == (2, 48)


def test_the_blocks_see_kept_tokens_only() -> None:
    encoder, seen = tiny_encoder(layout="native"), []
    encoder.backbone.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    encoder(pictures(), keep=chosen())
    assert seen == [(2, 1 + 7, 48)]


def test_a_tower_that_drops_patches_itself_refuses_keep() -> None:
    encoder = tiny_encoder(patch_drop_rate=0.5)
    with pytest.raises(InputError, match="patch_drop_rate"):
        encoder(pictures(), keep=chosen())


def test_a_compiled_backbone_gives_the_same_and_is_compiled_once_for_each_use() -> None:
    encoder, x, graphs = tiny_encoder(), pictures(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    names = list(encoder.state_dict())
    with torch.no_grad():
        expected = [encoder(x, keep=chosen(seed=seed)) for seed in range(3)] + [encoder(x)]
        encoder.compile_backbone(backend=backend)
        got = [encoder(x, keep=chosen(seed=seed)) for seed in range(3)] + [encoder(x)]
    torch.testing.assert_close(got, expected)
    assert len(graphs) == 2  # with and without indices; other indices need no new graph
    assert list(encoder.state_dict()) == names and not any("_orig_mod" in name for name in names)


def test_statistics_can_be_taken_over() -> None:
    encoder, x = tiny_encoder(), pictures()
    encoder.set_statistics((0.5, 0.5, 0.5), (0.25, 0.5, 0.5))
    assert encoder.std == (0.25, 0.5, 0.5)
    torch.testing.assert_close(encoder(x), encoder((x / 255 - 0.5) / torch.tensor([0.25, 0.5, 0.5]).view(1, 3, 1, 1)))


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
