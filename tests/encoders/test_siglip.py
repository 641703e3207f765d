"""The export into transformers' SiglipVisionModel computes the same, or says why it cannot."""

from __future__ import annotations

import pytest
import torch

from mmkit.encoders import build_encoder, to_siglip
from mmkit.errors import InputError

from .helpers import pictures, tiny_encoder


def test_every_hidden_state_is_equal() -> None:
    encoder, x = tiny_encoder(), pictures()
    model = to_siglip(encoder)
    with torch.inference_mode():
        out = model(pixel_values=encoder.normalise(x), output_hidden_states=True)
        torch.testing.assert_close(out.last_hidden_state, encoder.tokens(x), rtol=0, atol=1e-6)
        torch.testing.assert_close(out.last_hidden_state.mean(dim=1), encoder(x), rtol=0, atol=1e-6)
        for layer in (-1, -2, -3):
            torch.testing.assert_close(out.hidden_states[layer], encoder.tokens(x, layer), rtol=0, atol=1e-6)


def test_weights_are_copied_and_nothing_is_left_over() -> None:
    encoder = tiny_encoder()
    model = to_siglip(encoder)
    count = sum(p.numel() for p in encoder.parameters())
    assert sum(p.numel() for p in model.parameters()) == count
    before = encoder(pictures())
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert torch.equal(encoder(pictures()), before)


def test_config_says_exact_gelu_no_head_and_the_sizes() -> None:
    config = to_siglip(tiny_encoder()).config
    assert (config.hidden_act, config.vision_use_head) == ("gelu", False)
    assert (config.image_size, config.patch_size, config.num_hidden_layers) == (32, 8, 3)


def test_dtype_and_missing_biases() -> None:
    encoder = tiny_encoder(qkv_bias=False)
    model = to_siglip(encoder.to(torch.bfloat16))
    assert model.dtype == torch.bfloat16
    encoder = tiny_encoder(qkv_bias=False)
    with torch.inference_mode():
        out = to_siglip(encoder)(pixel_values=encoder.normalise(pictures()))
    torch.testing.assert_close(out.last_hidden_state, encoder.tokens(pictures()), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"layout": "native"}, "class token"),
        ({"reg_tokens": 2}, "register tokens"),
        ({"pre_norm": True}, "norm before the blocks"),
        ({"init_values": 0.1}, "layer scale"),
        ({"qk_norm": True}, "queries and keys"),
        ({"fc_norm": True}, "final norm"),
        ({"global_pool": "max"}, "pools by 'max'"),
        ({"act_layer": "mish"}, "activation"),
    ],
)
def test_other_layouts_are_refused_with_the_reason(arguments: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        to_siglip(tiny_encoder(**arguments))  # type: ignore[arg-type]


def test_a_convolutional_model_is_refused() -> None:
    with pytest.raises(InputError, match="not a plain ViT"):
        to_siglip(build_encoder("resnet10t", image_size=64))
