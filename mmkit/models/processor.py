"""The processor that is saved with an MLLM: pictures as in training, image tokens counted as the model counts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import CLIPImageProcessor, LlavaImageProcessor, LlavaProcessor, SiglipImageProcessor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mmkit.data.chat import leave_start_to_template
from mmkit.data.conversations import chat_template
from mmkit.data.images import Fit
from mmkit.data.pieces import IMAGE_MARKER
from mmkit.data.templates import OWN, Template
from mmkit.models.projectors import VisionLanguageModel, image_size, token_size
from mmkit.models.towers import prefix_tokens


def processor_for(
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    template: str | Template,
    image_fit: Fit = "squash",
) -> LlavaProcessor:
    """The processor that belongs to a model: picture size, patches, projector and class token read from its config.

    Args:
        model: Of `build_llava`, or opened.
        tokenizer: With the image token.
        mean: Per channel, the encoder's own.
        std: Likewise.
        template: Conversation template for the chat template.
        image_fit: How pictures become squares, as in training.

    Returns:
        As `build_processor`.
    """
    config = model.config
    return build_processor(
        tokenizer,
        image_size=image_size(config.vision_config),
        # To the processor, pixel shuffle is larger patches.
        patch_size=token_size(config),
        mean=mean,
        std=std,
        template=template,
        image_fit=image_fit,
        feature_select=config.vision_feature_select_strategy,
        class_token=prefix_tokens(config.vision_config) > 0,
    )


def build_processor(
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_size: int,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    template: str | Template,
    image_fit: Fit = "squash",
    feature_select: str = "full",
    class_token: bool = False,
    image_token: str = IMAGE_MARKER,
) -> LlavaProcessor:
    """The processor that belongs to a model of `build_llava`.

    Args:
        tokenizer: With the image token.
        image_size: Pictures become squares of this side, bicubic.
        patch_size: The tower's.
        mean: Per channel, the encoder's own (not CLIP's by habit).
        std: Likewise.
        template: Conversation template for the chat template.
        image_fit: How pictures become squares, as in training.
        feature_select: As in `build_llava`.
        class_token: Whether the tower has one.
        image_token: As in `build_llava`.

    Returns:
        A processor that expands each image token to as many as the projector gives features.
    """
    if template == OWN:
        leave_start_to_template(tokenizer)
    # Batched generation needs the prompts' ends aligned.
    tokenizer.padding_side = "left"
    # transformers saves what a tokenizer was made with, not what it was set to; a stranger's batches would be padded right.
    tokenizer.init_kwargs["padding_side"] = "left"
    return LlavaProcessor(
        image_processor=_image_processor(image_size, image_fit, mean, std),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=feature_select,
        # From this and the strategy the placeholders are counted; a wrong count shows only in the forward pass.
        num_additional_image_tokens=int(class_token),
        image_token=image_token,
        chat_template=chat_template(template, tokenizer),
    )


def _image_processor(size: int, fit: Fit, mean: Sequence[float], std: Sequence[float]) -> Any:
    """The image processor of transformers that fits pictures as `mmkit.data.images.fit_square` does, up to the library's resize.

    What was trained on padded squares would be shown squashed ones by everybody else, were this the same for all three.
    """
    common = {
        "resample": 3,  # PIL's bicubic
        "rescale_factor": 1 / 255,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    square = {"height": size, "width": size}
    if fit == "squash":
        return SiglipImageProcessor(size=square, **common)
    # The short side to the size, then the middle; after padding there is nothing left to cut.
    edges = {"size": {"shortest_edge": size}, "crop_size": square}
    # LLaVA's pads with the mean colour, before it resizes.
    return LlavaImageProcessor(do_pad=True, **edges, **common) if fit == "pad" else CLIPImageProcessor(**edges, **common)
