"""From a vision tower's tokens to word embeddings: the three projectors, each in a class that transformers has.

``mlp2x_gelu`` and ``linear`` are LlavaForConditionalGeneration's (or, behind a convolutional tower, FastVLM's); ``pixel_shuffle``
joins r x r patches into one token and is Aya Vision's, whose class takes any tower (InternVL's takes its own only). Whatever
the kind, ``model.model.multi_modal_projector`` is where it sits.
"""

from __future__ import annotations

from typing import Any, Union

import torch
from torch import nn
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mmkit.errors import InputError
from mmkit.models.towers import prefix_tokens

# One layout of modules (model.vision_tower, model.multi_modal_projector, model.language_model, lm_head) under three names.
VisionLanguageModel = Union[LlavaForConditionalGeneration, AyaVisionForConditionalGeneration, FastVlmForConditionalGeneration]
PROJECTORS = ("mlp2x_gelu", "linear", "pixel_shuffle")
# transformers' name of the identity; no other projector has it, so a saved config tells a linear one.
_IDENTITY = "linear"


def model_class(kind: str, vision_config: Any) -> tuple[type[Any], type[Any]]:
    """Class of model and config for a projector behind a tower."""
    if kind == "pixel_shuffle":
        return AyaVisionForConditionalGeneration, AyaVisionConfig
    if vision_config.model_type == "timm_wrapper":
        return FastVlmForConditionalGeneration, FastVlmConfig
    return LlavaForConditionalGeneration, LlavaConfig


def projector_settings(kind: str, pixel_shuffle: int, llm_width: int) -> dict[str, Any]:
    """What a model's config says about its projector."""
    if kind == "pixel_shuffle":
        # Gate and value each as wide as a word embedding, so that the hidden layer is as wide as mlp2x_gelu's.
        return {"downsample_factor": pixel_shuffle, "alignment_intermediate_size": 2 * llm_width}
    # One linear map in the two layers that transformers' class has: the second is the identity and stays so.
    return {"projector_hidden_act": _IDENTITY if kind == "linear" else "gelu"}


def check_projector(kind: str, pixel_shuffle: int, vision_config: Any) -> None:
    """Refuse an unknown projector, or a grid of patches that cannot be joined.

    Raises:
        InputError: With what to use instead.
    """
    if kind not in PROJECTORS:
        raise InputError(f"unknown projector {kind!r}", mend=f"use {', '.join(PROJECTORS)}")
    if kind != "pixel_shuffle":
        return
    side = patches_per_side(vision_config)
    if side % pixel_shuffle:
        whole = pixel_shuffle * patch_size(vision_config)
        raise InputError(
            f"a grid of {side} x {side} patches cannot be joined by {pixel_shuffle} x {pixel_shuffle}",
            where="pixel_shuffle",
            mend=f"choose another pixel_shuffle, or an image_size that is a multiple of {whole}",
        )


def new_projector(model: VisionLanguageModel, kind: str, seed: int) -> None:
    """Give the projector memory on the language model's device, and weights (torch's initialisation, as LLaVA has it).

    Args:
        model: The model, its projector still on the meta device.
        kind: One of PROJECTORS.
        seed: Of the weights; the global generator is left as it was.
    """
    head = model.lm_head.weight
    made = model.model.multi_modal_projector.to_empty(device=head.device).to(head.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in (made.linear_1, made.linear_2):
            # Drawn on the CPU in float32, so that a seed means the same weights everywhere.
            drawn = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            layer.load_state_dict(drawn.state_dict())
    if kind == "linear":
        nn.init.eye_(made.linear_2.weight)
        nn.init.zeros_(made.linear_2.bias)
    elif kind == "pixel_shuffle":
        # Memory from to_empty is whatever was there before.
        made.layernorm.reset_parameters()


def train_projector(model: VisionLanguageModel) -> None:
    """Set what of the projector trains: all of it, but of a linear one only the one map."""
    projector = model.model.multi_modal_projector
    projector.requires_grad_(True)
    if projector_kind(model.config)["projector"] == "linear":
        projector.linear_2.requires_grad_(False)


def projector_kind(config: Any) -> dict[str, Any]:
    """The projector of a saved config, in a recipe's words: ``{"projector": ..., "pixel_shuffle": r or None}``."""
    if config.model_type == "aya_vision":
        return {"projector": "pixel_shuffle", "pixel_shuffle": config.downsample_factor}
    return {"projector": "linear" if config.projector_hidden_act == _IDENTITY else "mlp2x_gelu", "pixel_shuffle": None}


def patch_size(vision_config: Any) -> int:
    """Side of a patch in pixels."""
    return _side(vision_config.patch_size)


def image_size(vision_config: Any) -> int:
    """Side of a picture in pixels."""
    return _side(vision_config.image_size)


def patches_per_side(vision_config: Any) -> int:
    """Patches in a row of the grid."""
    return image_size(vision_config) // patch_size(vision_config)


def token_size(config: Any) -> int:
    """Side in pixels of the square that one image token stands for: a patch, or r x r patches."""
    return patch_size(config.vision_config) * (projector_kind(config)["pixel_shuffle"] or 1)


def num_image_tokens(config: Any) -> int:
    """Image tokens that a picture takes in the text: one a token of the projector, class token included where it is kept."""
    vision = config.vision_config
    kept = prefix_tokens(vision) if config.vision_feature_select_strategy == "full" else 0
    return int((image_size(vision) // token_size(config)) ** 2 + kept)


def linear_as_relu(model: VisionLanguageModel) -> bool:
    """Rewrite a linear projector in place with an activation that every program knows; the map stays the same.

    W x + b = [W, -W] relu([I; -I] x) + b, since relu(x) - relu(-x) = x. vLLM builds its projector from the name of the
    activation and has none for the identity. The hidden layer is as wide as a word embedding, so the tower's tokens have to fit
    in twice.

    Returns:
        Whether it was done: False for another projector, or where the tower's tokens are too wide.
    """
    projector = model.model.multi_modal_projector
    width, hidden = projector.linear_1.in_features, projector.linear_1.out_features
    if projector_kind(model.config)["projector"] != "linear" or 2 * width > hidden:
        return False
    with torch.no_grad():
        weight, bias = projector.linear_1.weight.clone(), projector.linear_1.bias.clone()
        for layer in (projector.linear_1, projector.linear_2):
            layer.weight.zero_()
            layer.bias.zero_()
        eye = torch.eye(width, dtype=weight.dtype, device=weight.device)
        projector.linear_1.weight[: 2 * width] = torch.cat([eye, -eye])
        projector.linear_2.weight[:, : 2 * width] = torch.cat([weight, -weight], dim=1)
        projector.linear_2.bias.copy_(bias)
    model.config.projector_hidden_act = "relu"
    projector.act = nn.ReLU()
    return True


def _side(size: Any) -> int:
    """The side of a square that configs give as a number or a pair."""
    return int(size if isinstance(size, int) else size[0])
