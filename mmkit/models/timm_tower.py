"""timm models that no class of transformers computes, in transformers' own wrapper: convolutional towers, the last layer only.

The wrapper's hidden states are maps f[B, D, H, W], where LlavaForConditionalGeneration wants tokens f[B, N, D], so that class can
read no layer of it. FastVLM's class reads the last layer's map. Towers that give tokens (EVA, ViTs with other attention) have
no class in transformers that reads them through the wrapper and drops their class token.
"""

from __future__ import annotations

import torch
from transformers import TimmWrapperConfig, TimmWrapperModel

from mmkit.encoders.vit import VisionEncoder
from mmkit.errors import InputError

# In a recipe's words; to FastVLM, as to the encoder's own `tokens(x)`, it is what comes out of the last norm.
LAST = -1


def wrap_timm(encoder: VisionEncoder) -> TimmWrapperModel:
    """A timm model in transformers' wrapper; its own module is moved in, not copied.

    Args:
        encoder: An encoder whose last layer gives a map f[B, D, H, W] with H = W.

    Returns:
        The wrapper, in eval mode. Its config carries, besides what timm needs, ``hidden_size``, ``image_size``,
        ``patch_size`` (the stride of the last layer) and ``num_hidden_layers``.

    Raises:
        InputError: The last layer gives anything else.
    """
    grid = _grid(encoder)
    config = TimmWrapperConfig(
        architecture=encoder.architecture,
        # The wrapper itself says num_classes=0.
        model_args={key: value for key, value in encoder.model_args.items() if key != "num_classes"},
        do_pooling=False,
        # Not the wrapper's, but FastVLM and mmkit read them here.
        hidden_size=encoder.width,
        image_size=encoder.image_size,
        patch_size=encoder.image_size // grid,
        num_hidden_layers=len(encoder.backbone.feature_info),
    )
    with torch.device("meta"):
        model = TimmWrapperModel(config)
    model.timm_model = encoder.backbone
    return model.eval()


def check_wrapped(projector: str, feature_layer: int) -> None:
    """Refuse a projector or layer that cannot read a wrapped timm model.

    Args:
        projector: A projector's name in the recipe.
        feature_layer: Layer that the projector is to read.

    Raises:
        InputError: With the settings that work for this tower.
    """
    if feature_layer == LAST and projector != "pixel_shuffle":
        return
    raise InputError(
        f"this tower can only be opened through transformers' timm wrapper, and that gives no layer {feature_layer} to projector "
        f"{projector}: its hidden states are maps, not tokens",
        where="encoder",
        mend=f"use feature_layer: {LAST} with projector: mlp2x_gelu or linear, or a plain ViT",
    )


def _grid(encoder: VisionEncoder) -> int:
    """Side of the map that the last layer gives, found by trying: timm has no mark for it.

    Raises:
        InputError: It gives no map, or one that does not cover the picture evenly.
    """
    size = encoder.image_size
    parameter = next(encoder.backbone.parameters())
    training = encoder.backbone.training
    with torch.inference_mode():
        blank = torch.zeros(1, 3, size, size, dtype=parameter.dtype, device=parameter.device)
        # In eval mode: a picture of zeros must not enter the statistics of batch norms.
        shape = tuple(encoder.backbone.eval().forward_features(blank).shape)
    encoder.backbone.train(training)
    if len(shape) != 4 or shape[1] != encoder.width:
        raise InputError(
            f"no class of transformers computes this {type(encoder.backbone).__name__}, nor reads what its last layer gives "
            f"({list(shape)} for a picture) through the timm wrapper",
            where=_where(encoder),
            mend="use a plain ViT, or a convolutional tower with feature_layer: -1",
        )
    # The processor counts image tokens as picture over patch, rounded down: a map with a ragged edge has others.
    if shape[2] != shape[3] or size % shape[2] or shape[2] * shape[3] != encoder.num_tokens:
        raise InputError(
            f"its map of {shape[2]} x {shape[3]} does not cover {size} pixels evenly",
            where=_where(encoder),
            mend="choose an image_size that is a multiple of the tower's stride",
        )
    return int(shape[2])


def _where(encoder: VisionEncoder) -> str:
    """The tower in messages."""
    return f"encoder {encoder.architecture}"
