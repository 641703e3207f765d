"""timm models that no class of transformers computes, in transformers' own wrapper: the last layer only.

What the wrapper gives decides what can read it. Its hidden states are maps f[B, D, H, W], where
LlavaForConditionalGeneration wants tokens f[B, N, D], so that class can read no layer of it. Two others read the output of
the last layer: InternVL's class reads tokens, FastVLM's reads maps.
"""

from __future__ import annotations

import torch
from transformers import TimmWrapperConfig, TimmWrapperModel

from mmkit.encoders.vit import VisionEncoder
from mmkit.errors import InputError

# The layer that the wrapper can give, in a recipe's words, and what the encoder's `tokens(x)` returns.
LAST = -1


def wrap_timm(encoder: VisionEncoder) -> TimmWrapperModel:
    """A timm model in transformers' wrapper; its own module is moved in, not copied.

    Args:
        encoder: An encoder whose last layer gives tokens f[B, P + N, D] (P at most 1) or a map f[B, D, H, W].

    Returns:
        The wrapper, in eval mode. Its config carries, besides what timm needs, ``hidden_size``, ``image_size``,
        ``patch_size`` (the stride of the last layer), ``num_prefix_tokens`` and ``output_format`` ("NLC" or "NCHW").

    Raises:
        InputError: The last layer gives anything else.
    """
    found = _output_format(encoder)
    grid = round(encoder.num_tokens**0.5)
    patch = encoder.image_size // grid
    # The processor counts placeholders from picture and patch; a ragged grid would have another number of tokens.
    if grid * grid != encoder.num_tokens or (encoder.image_size // patch) ** 2 != encoder.num_tokens:
        raise InputError(
            f"its {encoder.num_tokens} tokens at {encoder.image_size} pixels are no square grid",
            where=_where(encoder),
            mend="choose an image_size that is a multiple of the tower's stride",
        )
    config = TimmWrapperConfig(
        architecture=encoder.architecture,
        # The wrapper itself says num_classes=0.
        model_args={key: value for key, value in encoder.model_args.items() if key != "num_classes"},
        do_pooling=False,
        # Not the wrapper's, but InternVL, FastVLM and mmkit read them here.
        hidden_size=encoder.width,
        image_size=encoder.image_size,
        patch_size=patch,
        num_prefix_tokens=encoder.num_prefix_tokens,
        num_hidden_layers=len(encoder.backbone.feature_info),
        output_format=found,
    )
    with torch.device("meta"):
        model = TimmWrapperModel(config)
    model.timm_model = encoder.backbone
    return model.eval()


def check_wrapped(output_format: str, projector: str, feature_layer: int) -> None:
    """Refuse a projector or layer that cannot read a wrapped timm model.

    Args:
        output_format: "NLC" or "NCHW", of the tower's config.
        projector: A projector's name in the recipe.
        feature_layer: Layer that the projector is to read.

    Raises:
        InputError: With the settings that work for this tower.
    """
    fits = (projector == "pixel_shuffle") == (output_format == "NLC")
    if feature_layer == LAST and fits:
        return
    kinds = "projector: pixel_shuffle" if output_format == "NLC" else "projector: mlp2x_gelu or linear"
    what = "gives tokens" if output_format == "NLC" else "gives a map"
    raise InputError(
        f"this tower can only be opened through transformers' timm wrapper, whose hidden states LLaVA cannot read: no layer "
        f"{feature_layer} with projector {projector}; its last layer {what}",
        where="encoder",
        mend=f"use feature_layer: {LAST} and {kinds}, or a plain ViT",
    )


def _output_format(encoder: VisionEncoder) -> str:
    """What the last layer gives, found by trying: timm has no mark for it."""
    size = encoder.image_size
    parameter = next(encoder.backbone.parameters())
    training = encoder.backbone.training
    with torch.inference_mode():
        blank = torch.zeros(1, 3, size, size, dtype=parameter.dtype, device=parameter.device)
        # In eval mode: a picture of zeros must not enter the statistics of batch norms.
        shape = tuple(encoder.backbone.eval().forward_features(blank).shape)
    encoder.backbone.train(training)
    width, prefix = encoder.width, encoder.num_prefix_tokens
    if shape[1:] == (prefix + encoder.num_tokens, width) and prefix <= 1 and hasattr(encoder.backbone, "forward_intermediates"):
        return "NLC"
    if len(shape) == 4 and shape[1] == width and shape[2] * shape[3] == encoder.num_tokens:
        return "NCHW"
    raise InputError(
        f"no class of transformers reads its last layer, {list(shape)} for a picture, with {prefix} prefix tokens",
        where=_where(encoder),
        mend="use a plain ViT, or a convolutional tower with feature_layer: -1",
    )


def _where(encoder: VisionEncoder) -> str:
    """The tower in messages."""
    return f"encoder {encoder.architecture}"
