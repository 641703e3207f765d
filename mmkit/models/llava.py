"""LLaVA from parts: any vision tower, a two-layer projector, any causal language model.

The result is a plain ``LlavaForConditionalGeneration``: its folder opens with transformers, vLLM and lmms-eval without
mmkit. Facts on the published model: facts/llava.md 1.2, 1.6; on the loss: performance.md 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipImageProcessor,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mmkit.data.conversations import IMAGE_MARKER, Template, chat_template
from mmkit.errors import InputError
from mmkit.models.adapters import has_lora
from mmkit.models.meta import read_meta, write_meta

# What LlavaForConditionalGeneration would drop from a language model without a word.
_LOST_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def _check_llm(llm: PreTrainedModel) -> None:
    """Refuse language models whose output is more than one linear layer on the last hidden state.

    Raises:
        InputError: With what would be lost.
    """
    head = llm.get_output_embeddings()
    # transformers' class applies a Linear without bias to the last hidden state; anything more would be lost on loading.
    if head is None or getattr(head, "bias", None) is not None:
        raise InputError(f"{type(llm).__name__} has no bias-free output layer, which LLaVA needs", mend="choose another LLM")
    for name in _LOST_SETTINGS:
        # Gemma 2, Cohere and Granite have these; at their neutral value nothing is lost.
        if getattr(llm.config, name, None) not in (None, 1, 1.0):
            raise InputError(
                f"{type(llm).__name__} sets {name}, which LlavaForConditionalGeneration drops",
                mend="choose an LLM without it",
            )


def _add_image_token(llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, image_token: str) -> int:
    """Make ``image_token`` one special token of the tokenizer, and the embeddings large enough for every id."""
    found = tokenizer.convert_tokens_to_ids(image_token)
    # A plain vocabulary entry is not enough: it must survive as one token inside any text, and be skipped in decoding.
    if found is None or found == tokenizer.unk_token_id or image_token not in tokenizer.all_special_tokens:
        token = AddedToken(image_token, special=True, normalized=False)
        # Setting the list replaces it: without the old ones they would lose their mark.
        kept = list(getattr(tokenizer, "extra_special_tokens", None) or [])
        tokenizer.add_special_tokens({"extra_special_tokens": [*kept, token]})
    # Many models have more rows than tokens; those spare ones are used before any are added.
    rows = llm.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        _grow_embeddings(llm, len(tokenizer))
    return int(tokenizer.convert_tokens_to_ids(image_token))


def _grow_embeddings(llm: PreTrainedModel, rows: int) -> None:
    """Add rows to the embeddings, each the mean of the old ones (the same on every run, unlike a drawn one)."""
    old = llm.get_input_embeddings().num_embeddings
    tied = llm.get_output_embeddings().weight is llm.get_input_embeddings().weight
    llm.resize_token_embeddings(rows, mean_resizing=False)
    # Both: a random row in the head could win over real words.
    layers = [llm.get_input_embeddings()] if tied else [llm.get_input_embeddings(), llm.get_output_embeddings()]
    with torch.no_grad():
        for layer in layers:
            layer.weight[old:] = layer.weight[:old].float().mean(dim=0).to(layer.weight.dtype)


def _num_image_tokens(config: Any, feature_select: str) -> int:
    """Image tokens per picture: patches, and the class token where a tower has one and "full" keeps it."""
    patches = (config.image_size // config.patch_size) ** 2
    return patches + int(has_class_token(config) and feature_select == "full")


def has_class_token(vision_config: Any) -> bool:
    """Whether a vision tower puts a class token in front (SigLIP's layout, SuperClass's, does not)."""
    return "siglip" not in vision_config.model_type


def _check_choices(vision: PreTrainedModel, feature_layer: int, feature_select: str, projector: str) -> None:
    """Refuse what the tower or transformers' class cannot do.

    Raises:
        InputError: With the choice and what to use instead.
    """
    if projector != "mlp2x_gelu":
        raise InputError(f"unknown projector {projector!r}", mend="use mlp2x_gelu")
    if feature_select not in ("full", "default"):
        raise InputError(f"unknown feature_select {feature_select!r}", mend="use full or default")
    # It would silently lose the first patch.
    if feature_select == "default" and not has_class_token(vision.config):
        raise InputError(
            f"feature_select default drops the first token, but {type(vision).__name__} has no class token",
            mend="use feature_select: full",
        )
    layers = vision.config.num_hidden_layers
    # One more hidden state than blocks: the first is the embeddings.
    if not -layers - 1 <= feature_layer <= layers:
        raise InputError(f"feature_layer {feature_layer} of a tower with {layers} blocks", mend="use -2")


def build_llava(
    vision: PreTrainedModel,
    llm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    feature_layer: int = -2,
    feature_select: str = "full",
    projector: str = "mlp2x_gelu",
    image_token: str = IMAGE_MARKER,
    seed: int = 0,
) -> LlavaForConditionalGeneration:
    """Assemble a LLaVA model; the parts' modules are moved in, never copied.

    Args:
        vision: ``SiglipVisionModel``, ``CLIPVisionModel`` or another tower with hidden states.
        llm: Causal language model; its embeddings grow if the tokenizer needs it.
        tokenizer: Gets ``image_token`` as a special token if it lacks it.
        feature_layer: Which of the tower's hidden states the projector reads; -2 is before the last block.
        feature_select: "full" keeps all tokens; "default" drops the first (a class token).
        projector: "mlp2x_gelu": Linear, GELU, Linear; the one shape transformers' class has.
        image_token: Placeholder in the text.
        seed: Of the projector's weights.

    Returns:
        The model, in eval mode; projector in the language model's dtype.

    Raises:
        InputError: For a part or a choice that cannot be combined.
    """
    _check_choices(vision, feature_layer, feature_select, projector)
    _check_llm(llm)
    image_token_id = _add_image_token(llm, tokenizer, image_token)
    embed = llm.get_input_embeddings()
    # By identity and not by the configuration, which says what was wished.
    tied = llm.get_output_embeddings().weight is embed.weight
    if tied and getattr(llm.base_model, "embed_tokens", None) is not embed:
        # transformers ties by the name embed_tokens; where the LLM calls it otherwise, the head becomes its own.
        llm.get_output_embeddings().weight = nn.Parameter(embed.weight.detach().clone())
        llm.config.tie_word_embeddings = tied = False
    config = LlavaConfig(
        vision_config=vision.config,
        # The LLM's own object: its vocabulary size has just grown with the embeddings.
        text_config=llm.config,
        image_token_index=image_token_id,
        image_seq_length=_num_image_tokens(vision.config, feature_select),
        projector_hidden_act="gelu",
        vision_feature_select_strategy=feature_select,
        vision_feature_layer=feature_layer,
        tie_word_embeddings=tied,
        dtype=llm.dtype,
    )
    # On the meta device the placeholders cost nothing; every one of them is replaced below.
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = vision
    model.model.language_model = llm.base_model
    # The layer itself: a tied weight stays one tensor with the embeddings.
    model.lm_head = llm.get_output_embeddings()
    _new_projector(model, seed)
    # The language model's start and stop tokens are in there.
    model.generation_config = llm.generation_config
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers())), "a placeholder was left in"
    return model.eval()


def _new_projector(model: LlavaForConditionalGeneration, seed: int) -> None:
    """Projector weights on the language model's device, torch's initialisation as in the published code."""
    head = model.lm_head.weight
    # The projector has no part that it could be taken from, so the placeholder is given memory here and weights below.
    made = model.model.multi_modal_projector.to_empty(device=head.device).to(head.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in (made.linear_1, made.linear_2):
            # Drawn on the CPU in float32, so that a seed means the same weights everywhere.
            drawn = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            layer.load_state_dict(drawn.state_dict())


def build_processor(
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_size: int,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    template: str | Template,
    feature_select: str = "full",
    class_token: bool = False,
    image_token: str = IMAGE_MARKER,
) -> LlavaProcessor:
    """The processor that belongs to a model of `build_llava`.

    Args:
        tokenizer: With the image token.
        image_size: Pictures are resized to this square, bicubic.
        patch_size: The tower's.
        mean: Per channel, the encoder's own (not CLIP's by habit).
        std: Likewise.
        template: Conversation template for the chat template.
        feature_select: As in `build_llava`.
        class_token: Whether the tower has one.
        image_token: As in `build_llava`.

    Returns:
        A processor that expands each image token to as many as the projector gives features.
    """
    # A plain resize to a square for every tower, CLIP's too: mmkit fits pictures itself, and this one has no centre crop.
    images = SiglipImageProcessor(
        do_resize=True,
        size={"height": image_size, "width": image_size},
        resample=3,  # PIL's bicubic
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(mean),
        image_std=list(std),
        do_convert_rgb=True,
    )
    # Batched generation needs the prompts' ends aligned.
    tokenizer.padding_side = "left"
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=feature_select,
        # From this and the strategy the placeholders are counted; a wrong count shows only in the forward pass.
        num_additional_image_tokens=int(class_token),
        image_token=image_token,
        chat_template=chat_template(template),
    )


def save_mllm(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    folder: str | Path,
    *,
    meta: dict[str, Any],
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write the model folder: weights (the vision tower's too), processor, mmkit.json.

    Args:
        model: LoRA merged.
        processor: Of `build_processor`.
        folder: Made if missing.
        meta: For mmkit.json, beside ``"kind": "mllm"``.
        state_dict: Weights gathered by an engine; the model's own if None.

    Raises:
        ValueError: When LoRA layers are still in place: other programs could not open the folder.
    """
    # An error rather than a merge: merging changes the model that is perhaps still in training.
    if has_lora(model):
        raise ValueError("the model still has LoRA layers: call merge_lora(model) first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, state_dict=state_dict)
    processor.save_pretrained(folder)
    write_meta(folder, "mllm", meta)


def load_mllm(folder: str | Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor, dict[str, Any]]:
    """Open a model folder.

    Returns:
        Model (in eval mode), processor, and the content of mmkit.json.

    Raises:
        InputError: When the folder is no MLLM's.
    """
    meta = read_meta(folder, "mllm")
    return LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder), meta


def _embed(model: LlavaForConditionalGeneration, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
    """Word embeddings with the pictures' features in place of image tokens; f[B, T, H].

    One path for batches with and without pictures. ZeRO puts gradients together, and ZeRO-3 weights, in the order in which the
    modules run; where two ranks had two orders, unlike parameters would be added up.
    """
    embeds = model.get_input_embeddings()(input_ids)
    # A frozen tower may be bfloat16 under a float32 model.
    tower_dtype = model.model.vision_tower.dtype
    blank = pixel_values is None or len(pixel_values) == 0
    if pixel_values is None or blank:
        size = model.config.vision_config.image_size
        # One blank picture, not one a row as LLaVA does: the gradient is zero either way, the tower's work is not.
        pixel_values = torch.zeros(1, 3, size, size, device=input_ids.device)
    found = model.get_image_features(pixel_values.to(tower_dtype), return_dict=True).pooler_output
    features = torch.cat(tuple(found)).to(embeds.dtype)
    if blank:
        # Zero times and not detached: the graph must reach the projector. One number is enough for that.
        return embeds + 0.0 * features.mean()
    places = model.model.get_placeholder_mask(input_ids, inputs_embeds=embeds, image_features=features)
    return embeds.masked_scatter(places, features)


def llava_loss_sum(
    model: LlavaForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    pixel_values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy over supervised tokens, logits made at those positions only.

    Text-only batches run a blank picture through tower and projector and add its features times zero, so that every
    trainable parameter gets a gradient and collectives on all ranks match (facts/llava.md 1.11, the ZeRO-3 hang).

    Args:
        model: The model, LoRA or not.
        input_ids: i64[B, T], image tokens expanded.
        attention_mask: i64[B, T], 1 for true tokens.
        labels: i64[B, T], aligned with ``input_ids`` (not shifted); -100 where nothing is learnt.
        pixel_values: f[I, 3, S, S], the pictures of the rows that have one, in order; None or I = 0 for text only.

    Returns:
        f32[] loss sum, i64[] number of supervised tokens.

    Raises:
        ValueError: When image tokens and image features do not match in number (from transformers).
    """
    embeds = _embed(model, input_ids, pixel_values)
    out = model.model(inputs_embeds=embeds, attention_mask=attention_mask, use_cache=False)
    # Position t predicts token t + 1.
    targets = labels[:, 1:]
    chosen = targets != -100
    # Most positions are image or question: full logits at 2048 x 32000 would take 655 MB a sequence (performance.md 6).
    logits = model.lm_head(out.last_hidden_state[:, :-1][chosen])
    # A sum: of no tokens it is 0 with a gradient, where a mean would be NaN.
    return F.cross_entropy(logits.float(), targets[chosen], reduction="sum"), chosen.sum()
