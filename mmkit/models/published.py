"""Model folders of LLaVA's class without an mmkit.json: what `mmkit export --format llava` writes, and llava-hf's and others'.

What mmkit.json would say is read from the folder's own config, processor and chat template, so that such a folder is asked as its
makers ask it. Pictures go through mmkit's own resize, with the processor's size, fit, mean and standard deviation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaProcessor

from mmkit.data.chat import original_template
from mmkit.data.images import Fit
from mmkit.data.pieces import ConversationError
from mmkit.data.processor_chat import processor_template
from mmkit.data.templates import OWN, TEMPLATES, Template, template_jinja
from mmkit.errors import InputError
from mmkit.models.generation import choose_padding
from mmkit.models.llava import load_mllm
from mmkit.models.meta import META_FILE
from mmkit.models.projectors import VisionLanguageModel, image_size, num_image_tokens

# Classes that mmkit's own products have; with other processors (tiles, several sizes) a folder of these is another model.
CLASSES = ("LlavaForConditionalGeneration", "AyaVisionForConditionalGeneration", "FastVlmForConditionalGeneration")
_BICUBIC = 3


def open_mllm(folder: str | Path) -> tuple[VisionLanguageModel, LlavaProcessor, dict[str, Any]]:
    """Open a model folder of mmkit's or of others for inference.

    Args:
        folder: With weights, config, processor, tokenizer and chat template.

    Returns:
        Model (in eval mode), processor, and what mmkit.json says or would say: ``mean``, ``std``, ``image_size``, ``image_fit``,
        ``num_image_tokens``, ``template`` (a name, or a `Template`).

    Raises:
        InputError: Its pictures or prompts are prepared in a way that mmkit does not know.
    """
    folder = Path(folder)
    if (folder / META_FILE).is_file():
        return load_mllm(folder)
    try:
        config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    # transformers' word for a missing or damaged file of either.
    except (OSError, ValueError) as error:
        # The rest of its sentence is about names on the hub.
        reason = " ".join(str(error).split()).partition(". If")[0]
        what = f"its config or processor cannot be opened ({reason})"
        raise InputError(what, where=folder, mend="fetch the whole folder again") from None
    if not isinstance(processor, LlavaProcessor) or processor.image_processor is None:
        what = f"its processor is a {type(processor).__name__}, not LLaVA's"
        raise InputError(what, where=folder, mend="give a LLaVA 1.5 folder, or a run of stage llava")
    choose_padding(processor.tokenizer)
    meta = _pictures(config, processor.image_processor, folder) | {"template": _template(processor, folder)}
    # Last: what is wrong with the rest is told before gigabytes are read.
    return AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval(), processor, meta


def _pictures(config: Any, how: Any, folder: Path) -> dict[str, Any]:
    """What a picture becomes: size, fit, mean, std and number of tokens."""
    name = type(how).__name__
    resample = getattr(how, "resample", None)
    plain = {
        "do_resize": how.do_resize,
        "do_rescale": how.do_rescale and abs(how.rescale_factor * 255 - 1) < 1e-6,
        "do_normalize": how.do_normalize,
        "resample": resample is None or int(resample) == _BICUBIC,
    }
    if odd := [key for key, usual in plain.items() if not usual]:
        values = ", ".join(f"{key} {getattr(how, key)}" for key in odd)
        mend = "mmkit resizes (bicubic), scales to 0..1 and normalises: ask this model with transformers"
        raise InputError(f"its {name} does otherwise than mmkit can ({values})", where=folder, mend=mend)
    size, fit = _square(how, folder)
    if size != image_size(config.vision_config):
        what = f"its processor makes pictures of {size} pixels, its vision tower takes {image_size(config.vision_config)}"
        raise InputError(what, where=folder, mend="mend preprocessor_config.json")
    return {
        "mean": list(how.image_mean),
        "std": list(how.image_std),
        "image_size": size,
        "image_fit": fit,
        "num_image_tokens": num_image_tokens(config),
    }


def _square(how: Any, folder: Path) -> tuple[int, Fit]:
    """Side of the square that a processor makes of a picture, and how."""
    size, crop = (dict(getattr(how, name, None) or {}) for name in ("size", "crop_size"))
    height, width, edge = size.get("height"), size.get("width"), size.get("shortest_edge")
    if getattr(how, "do_center_crop", None):
        # Only where the crop takes the whole of the shorter side is it mmkit's.
        if edge is not None and edge == crop.get("height") == crop.get("width"):
            return edge, "pad" if type(how).__name__.startswith("LlavaImageProcessor") and how.do_pad else "crop"
    elif height is not None and height == width:
        return height, "squash"
    given = {"size": size, "crop_size": crop}
    what = f"its {type(how).__name__} makes no square that mmkit knows ({given})"
    raise InputError(what, where=folder, mend="ask this model with transformers")


def _template(processor: LlavaProcessor, folder: Path) -> str | Template:
    """The conversation template behind a processor's chat template: one of mmkit's by its text, else the template itself."""
    tokenizer = processor.tokenizer
    jinja = processor.chat_template or tokenizer.chat_template
    if not isinstance(jinja, str):
        raise InputError("has no chat template", where=folder, mend="put a chat_template.jinja into the folder")
    if not tokenizer.is_fast:
        raise InputError("prompts need a fast tokenizer", where=folder, mend="add its tokenizer.json")
    for name, template in TEMPLATES.items():
        if template_jinja(template) == jinja:
            return name
    if (original := original_template(jinja)) != jinja:
        # The language model's own, extended by mmkit for pictures; without that it is what the run was trained with.
        tokenizer.chat_template = original
        return OWN
    try:
        return processor_template(jinja, tokenizer, processor.image_token)
    except ConversationError as error:
        raise InputError(
            error.reason, where=folder, mend="mend chat_template.jinja, or ask this model with transformers"
        ) from None
