"""Projectors: what they compute, what of them trains, and how a linear one is written for vLLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mmkit.models.adapters import freeze_for
from mmkit.models.llava import build_llava
from mmkit.models.projectors import linear_as_relu, num_image_tokens, projector_kind

from .tiny import clip, llama, siglip, tokenizer


def model_with(projector: str, *, tower: Any = None, seed: int = 0, **more: Any) -> Any:
    tok = tokenizer("sp", image=False)
    return build_llava(tower or siglip(size=64), llama(tok), tok, projector=projector, seed=seed, **more)


def features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    return torch.stack(tuple(model.get_image_features(pixels, return_dict=True).pooler_output))


def test_linear_is_one_map_and_stays_one() -> None:
    model = model_with("linear")
    projector = model.model.multi_modal_projector
    freeze_for(model, "projector")
    trained = [name for name, p in projector.named_parameters() if p.requires_grad]
    assert trained == ["linear_1.weight", "linear_1.bias"]
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        features(model, pixels).square().sum().backward()
        optimizer.step()
    assert torch.equal(projector.linear_2.weight, torch.eye(32)) and not projector.linear_2.bias.any()
    with torch.no_grad():
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(features(model, pixels), projector.linear_1(hidden))


def test_a_linear_projector_as_relu_is_the_same_map() -> None:
    # Tokens of 16 fit twice into word embeddings of 32.
    model = model_with("linear", tower=_narrow_tower())
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.bias.normal_()
        before = features(model, pixels)
        assert linear_as_relu(model)
        assert model.config.projector_hidden_act == "relu"
        torch.testing.assert_close(features(model, pixels), before, rtol=0, atol=1e-6)


def test_what_cannot_be_written_as_relu_is_left_alone() -> None:
    for model in (model_with("linear"), model_with("mlp2x_gelu")):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert not linear_as_relu(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def _narrow_tower() -> Any:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=16, vision_use_head=False)).eval()


@pytest.mark.parametrize("factor", [2, 4])
def test_pixel_shuffle_joins_squares_of_patches(factor: int) -> None:
    model = model_with("pixel_shuffle", pixel_shuffle=factor)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    side = 4 // factor
    assert num_image_tokens(model.config) == side * side
    with torch.no_grad():
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        # The slow twin: every token is the patches of its own square, side by side.
        grid = hidden.reshape(2, 4, 4, 24)
        tokens = []
        for row in range(side):
            for column in range(side):
                square = grid[:, row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
                tokens.append(square.reshape(2, -1))
        joined = torch.stack(tokens, dim=1)
        projector = model.model.multi_modal_projector
        value, gate = projector.linear_1(projector.layernorm(joined)).chunk(2, dim=-1)
        expected = projector.linear_2(nn.functional.silu(gate) * value)
        torch.testing.assert_close(features(model, pixels), expected)
    assert projector.linear_2.in_features == 32, "as wide inside as mlp2x_gelu"


def test_pixel_shuffle_drops_the_class_token() -> None:
    model = model_with("pixel_shuffle", tower=clip())
    assert model.config.vision_feature_select_strategy == "default"
    assert features(model, torch.randn(1, 3, 32, 32)).shape == (1, 1, 32)


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear", "pixel_shuffle"])
def test_weights_come_from_the_seed_and_a_config_tells_the_kind(kind: str) -> None:
    first, again, other = (model_with(kind, seed=seed) for seed in (1, 1, 2))
    weights = [model.model.multi_modal_projector.state_dict() for model in (first, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["linear_1.weight"], weights[2]["linear_1.weight"])
    assert projector_kind(first.config) == {"projector": kind, "pixel_shuffle": 2 if kind == "pixel_shuffle" else None}
    # Everything of it trains, but for the second layer of the linear one.
    freeze_for(first, "full")
    frozen = {name for name, p in first.model.multi_modal_projector.named_parameters() if not p.requires_grad}
    assert frozen == ({"linear_2.weight", "linear_2.bias"} if kind == "linear" else set())
