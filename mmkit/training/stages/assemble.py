"""The model that a LLaVA stage trains: put together from an encoder and a language model, or gone on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmkit.config import LlavaRecipe, LlmConfig
from mmkit.data.conversations import stop_tokens
from mmkit.encoders.save import load_encoder
from mmkit.encoders.vit import at_size
from mmkit.files import hash_text
from mmkit.models.generation import add_stop_tokens
from mmkit.models.llava import build_llava, load_mllm
from mmkit.models.llm import build_llm, load_tokenizer
from mmkit.models.processor import processor_for
from mmkit.models.projectors import num_image_tokens, patch_size, projector_kind
from mmkit.models.reuse import take_projector
from mmkit.models.towers import vision_tower
from mmkit.run import Parent, fingerprint_of_name, resolve_parent


class Opened(NamedTuple):
    """A model ready to be frozen and trained.

    Attributes:
        model: `mmkit.models.projectors.VisionLanguageModel`.
        processor: Its LlavaProcessor, with the recipe's template.
        meta: For the product's mmkit.json.
        parents: What it was made from, in the order of `mmkit.commands.parents_of`.
    """

    model: Any
    processor: Any
    meta: dict[str, Any]
    parents: list[Parent]


def open_model(recipe: LlavaRecipe, *, dtype: torch.dtype | None = None, empty: bool = False) -> Opened:
    """Load the model of another run, or assemble one.

    Args:
        recipe: Of the stage.
        dtype: Of the weights; None: as they are stored in a run, fp32 for a language model by name.
        empty: Without weights (the encoder's, which are few, aside), for a process that is given them later.

    Raises:
        InputError: As the parts raise it, or the projector to start from belongs to other parts.
    """
    opened = _go_on(recipe, recipe.model, dtype, empty) if recipe.model is not None else _assemble(recipe, dtype, empty)
    # Learnt with the template, so generation has to stop there, in other people's programs too.
    add_stop_tokens(opened.model, stop_tokens(recipe.template, opened.processor.tokenizer))
    return opened


def _go_on(recipe: LlavaRecipe, source: str, dtype: torch.dtype | None, empty: bool) -> Opened:
    """The model of another run."""
    parent = resolve_parent("model", source)
    model, processor, meta = load_mllm(parent.folder or Path(source), dtype=dtype, empty=empty)
    # These two may change between the stages: LLaVA aligns with plain text and crops, and tunes with Vicuna's and padding.
    meta = {**meta, "template": recipe.template, "image_fit": recipe.image_fit}
    # Made anew: the chat template inside belongs to the conversation template, the image processor to the fit.
    processor = processor_for(
        model, processor.tokenizer, mean=meta["mean"], std=meta["std"], template=recipe.template, image_fit=recipe.image_fit
    )
    return Opened(model, processor, meta, [parent])


def _assemble(recipe: LlavaRecipe, dtype: torch.dtype | None, empty: bool) -> Opened:
    """A new model from an encoder and a language model."""
    # The recipe's schema sees to it.
    assert recipe.encoder is not None and recipe.llm is not None
    parent = resolve_parent("encoder", recipe.encoder)
    parents = [parent] + ([resolve_parent("llm", recipe.llm.name)] if recipe.llm.name else [])
    encoder = load_encoder(parent.folder or recipe.encoder)
    encoder = at_size(encoder, recipe.image_size or encoder.image_size)
    # The recipe's schema sees to it that one of the two is given.
    tokenizer = load_tokenizer(recipe.llm.tokenizer or recipe.llm.name or "")
    llm = build_llm(
        recipe.llm.name,
        config=recipe.llm.config,
        pretrained=recipe.llm.name is not None,
        dtype=dtype,
        seed=recipe.seed,
        tokenizer=tokenizer,
        empty=empty,
    )
    model = build_llava(
        # The encoder rewritten as one of transformers' towers, so that transformers opens the product without mmkit; in the LLM's
        # dtype, as the product will be opened. Many published towers are stored in halves.
        vision_tower(encoder).to(llm.dtype),
        llm,
        tokenizer,
        feature_layer=recipe.feature_layer,
        projector=recipe.projector,
        pixel_shuffle=recipe.pixel_shuffle or 2,
        seed=recipe.seed,
    )
    processor = processor_for(
        model, tokenizer, mean=encoder.mean, std=encoder.std, template=recipe.template, image_fit=recipe.image_fit
    )
    # What prediction and the next stage need, and no model format has a place for.
    meta = {
        "template": recipe.template,
        # The folder has room for one chat template only; a later stage may ask for the language model's own.
        "chat_template": tokenizer.get_chat_template() if tokenizer.chat_template else None,
        "image_fit": recipe.image_fit,
        "image_size": encoder.image_size,
        "patch_size": patch_size(model.config.vision_config),
        "num_image_tokens": num_image_tokens(model.config),
        "feature_layer": recipe.feature_layer,
        **projector_kind(model.config),
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "encoder": {"path": recipe.encoder, "fingerprint": parent.fingerprint},
        "llm": {"name": recipe.llm.name, "fingerprint": _llm_fingerprint(recipe.llm, parents, recipe.seed)},
    }
    if recipe.projector_from is not None:
        origin = resolve_parent("projector", recipe.projector_from)
        take_projector(model, meta, origin.folder or Path(recipe.projector_from), recipe.projector_from)
        parents.append(origin)
    return Opened(model, processor, meta, parents)


def _llm_fingerprint(config: LlmConfig, parents: list[Parent], seed: int) -> str:
    """What tells two language models apart: weights and tokenizer; of random weights, what they are drawn from."""
    if config.name is not None:
        # The last so far: the origin of the projector is appended after this.
        own = parents[-1].fingerprint
    else:
        own = hash_text(json.dumps(config.config, sort_keys=True), str(seed))
    # The same weights under other token ids are another language.
    return own if config.tokenizer is None else hash_text(own, fingerprint_of_name(config.tokenizer))
