"""A projector belongs to the encoder, the LLM, the layer and the picture size that it was trained with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmkit.errors import InputError
from mmkit.models.adapters import freeze_for
from mmkit.models.llava import build_llava, save_mllm
from mmkit.models.processor import processor_for
from mmkit.models.reuse import check_origin, take_projector, tuned_parts

from .tiny import llama, siglip, tokenizer

META: dict[str, Any] = {
    "encoder": {"path": "runs/encoder", "fingerprint": "aaaaaaaa1111"},
    "llm": {"name": "vicuna", "fingerprint": "bbbbbbbb2222"},
    "feature_layer": -2,
    "image_size": 32,
    "projector": "mlp2x_gelu",
    "pixel_shuffle": None,
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
}


def model(seed: int = 0) -> tuple[Any, Any]:
    tok = tokenizer("sp", image=False)
    return build_llava(siglip(), llama(tok), tok, seed=seed), tok


def test_the_projector_is_taken_and_nothing_else(tmp_path) -> None:
    old, tok = model(seed=1)
    with torch.no_grad():
        old.lm_head.weight.zero_()
    save_mllm(old, processor_for(old, tok, mean=[0.5] * 3, std=[0.5] * 3, template="demo"), tmp_path, meta=META)
    new, _ = model(seed=2)
    before = {name: value.clone() for name, value in new.state_dict().items()}
    take_projector(new, META, tmp_path, "runs/align")
    for name, value in new.state_dict().items():
        expected = old.state_dict()[name] if "multi_modal_projector" in name else before[name]
        assert torch.equal(value, expected), name
    assert not torch.equal(before["model.multi_modal_projector.linear_1.weight"], old.model.multi_modal_projector.linear_1.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Equal shapes, other weights: nothing but the fingerprint tells.
        (
            {"encoder": {"path": "runs/other", "fingerprint": "cccccccc"}},
            r"runs/align: .* trained with encoder runs/other \(cccccccc\), this model has runs/encoder \(aaaaaaaa\)",
        ),
        ({"llm": {"name": "vicuna", "fingerprint": "dddddddd"}}, r"llm vicuna \(dddddddd\), this model has vicuna \(bbbbbbbb\)"),
        ({"llm": {"name": None, "fingerprint": "dddddddd"}}, r"llm with random weights \(dddddddd\)"),
        ({"llm": {"name": "vicuna"}}, "records no fingerprint of its llm"),
        ({"feature_layer": -1}, "with feature_layer -1, this model has -2; use feature_layer=-1"),
        ({"image_size": 48}, "with image_size 48, this model has 32"),
        ({"projector": "linear"}, "with projector linear, this model has mlp2x_gelu"),
        ({"pixel_shuffle": 4}, "with pixel_shuffle 4"),
        ({"tuned": ["llm"]}, "its llm was tuned together with the projector"),
        ({"tuned": ["encoder"]}, "its encoder was tuned together"),
    ],
)
def test_another_origin_is_refused(change: dict[str, Any], message: str) -> None:
    check_origin(META, dict(META), "runs/align")
    with pytest.raises(InputError, match=message):
        check_origin(META, {**META, **change}, "runs/align")


def test_what_is_tuned_is_seen_on_the_weights() -> None:
    made, _ = model()
    freeze_for(made, "projector")
    assert tuned_parts(made, {}) == []
    # What an earlier stage tuned stays tuned.
    assert tuned_parts(made, {"tuned": ["llm"]}) == ["llm"]
    freeze_for(made, "full", train_encoder=True)
    assert tuned_parts(made, {}) == ["encoder", "llm"]
    freeze_for(made, "lora", lora={"r": 2, "alpha": 2})
    assert tuned_parts(made, {}) == ["llm"]
