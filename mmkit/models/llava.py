"""LLaVA from parts: any vision tower, a projector, any causal language model.

The result is a plain ``LlavaForConditionalGeneration`` (with pixel shuffle, Aya Vision's class): its folder opens with
transformers, vLLM and lmms-eval without mmkit. Facts on the published model: facts/llava.md 1.2, 1.6; on the loss:
performance.md 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaProcessor
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mmkit.data.pieces import IMAGE_MARKER
from mmkit.errors import InputError
from mmkit.models.adapters import has_lora
from mmkit.models.generation import choose_padding, settle_generation
from mmkit.models.llm import lost_settings
from mmkit.models.lm_loss import TokenLossHead
from mmkit.models.meta import read_meta, write_meta
from mmkit.models.packed import packed_arguments
from mmkit.models.projectors import (
    VisionLanguageModel,
    check_projector,
    image_size,
    model_class,
    new_projector,
    num_image_tokens,
    projector_settings,
)
from mmkit.models.timm_tower import check_wrapped
from mmkit.models.towers import prefix_tokens

# Towers whose weights lie one level deeper in published checkpoints than in transformers 5.
_NESTED_TOWERS = ("clip_vision_model", "siglip_vision_model")


def _check_llm(llm: PreTrainedModel) -> None:
    """Refuse language models whose output is more than one linear layer on the last hidden state.

    Raises:
        InputError: With what would be lost.
    """
    head = llm.get_output_embeddings()
    # transformers' class applies a Linear without bias to the last hidden state; anything more would be lost on loading.
    if head is None or getattr(head, "bias", None) is not None:
        raise InputError(f"{type(llm).__name__} has no bias-free output layer, which LLaVA needs", mend="choose another LLM")
    if lost := lost_settings(llm.config):
        raise InputError(
            f"{type(llm).__name__} sets {lost[0]}, which LlavaForConditionalGeneration drops", mend="choose an LLM without it"
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


def check_choices(vision: Any, *, feature_layer: int, feature_select: str | None, projector: str, pixel_shuffle: int) -> str:
    """Refuse what the tower or transformers' classes cannot do.

    Args:
        vision: Config of the vision tower.
        feature_layer: This and the rest are as `build_llava` takes them.
        feature_select: See there.
        projector: See there.
        pixel_shuffle: See there.

    Returns:
        The feature selection: "default" where a class token is there to be dropped, if none was asked for.

    Raises:
        InputError: With the choice and what to use instead.
    """
    check_projector(projector, pixel_shuffle, vision)
    has_class_token = prefix_tokens(vision) > 0
    select = feature_select or ("default" if has_class_token else "full")
    if select not in ("full", "default"):
        raise InputError(f"unknown feature_select {select!r}", mend="use full or default")
    # It would silently lose the first patch.
    if select == "default" and not has_class_token:
        raise InputError(
            f"feature_select default drops the first token, but a {vision.model_type} has no class token",
            mend="use feature_select: full",
        )
    if select == "full" and has_class_token and projector == "pixel_shuffle":
        raise InputError("a class token has no place in the grid that is shuffled", mend="use feature_select: default")
    layers = vision.num_hidden_layers
    # One more hidden state than blocks: the first is the embeddings.
    # 0 is what transformers' class takes for "none given".
    if not -layers - 1 <= feature_layer <= layers or feature_layer == 0:
        what = f"feature_layer {feature_layer} of a tower with {layers} blocks"
        raise InputError(what, mend=f"use -2, or any other from {-layers - 1} to {layers} but 0")
    if vision.model_type == "timm_wrapper":
        check_wrapped(projector, feature_layer)
    return select


def llava_config(
    vision: Any,
    text: Any,
    *,
    feature_layer: int,
    feature_select: str | None,
    projector: str,
    pixel_shuffle: int,
    **more: Any,
) -> tuple[type[Any], Any]:
    """Class and config of the model that `build_llava` makes; also for a plan, which has no weights.

    Args:
        vision: Config of a vision tower.
        text: Config of a language model.
        feature_layer: This and the next three are as `build_llava` takes them.
        feature_select: See there.
        projector: See there.
        pixel_shuffle: See there.
        more: Further fields of the config, such as ``image_token_id`` and ``tie_word_embeddings``.

    Raises:
        InputError: For choices that cannot be combined.
    """
    select = check_choices(
        vision,
        feature_layer=feature_layer,
        feature_select=feature_select,
        projector=projector,
        pixel_shuffle=pixel_shuffle,
    )
    kind, config_kind = model_class(projector, vision)
    config = config_kind(
        vision_config=vision,
        text_config=text,
        vision_feature_select_strategy=select,
        vision_feature_layer=feature_layer,
        **projector_settings(projector, pixel_shuffle, text.hidden_size),
        **more,
    )
    config.image_seq_length = num_image_tokens(config)
    return kind, config


def build_llava(
    vision: PreTrainedModel,
    llm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    feature_layer: int = -2,
    feature_select: str | None = None,
    projector: str = "mlp2x_gelu",
    pixel_shuffle: int = 2,
    image_token: str = IMAGE_MARKER,
    seed: int = 0,
) -> VisionLanguageModel:
    """Assemble a LLaVA model; the parts' modules are moved in, never copied.

    Args:
        vision: Of `mmkit.models.towers.vision_tower`, or any ``SiglipVisionModel``, ``CLIPVisionModel``, ``Dinov2Model``.
        llm: Causal language model; its embeddings grow if the tokenizer needs it.
        tokenizer: Gets ``image_token`` as a special token if it lacks it, and a padding token if it has none.
        feature_layer: Which of the tower's hidden states the projector reads; -2 is before the last block.
        feature_select: "full" keeps all tokens; "default" drops the first; None drops a class token where there is one.
        projector: "mlp2x_gelu" (Linear, GELU, Linear), "linear" (one map; LLaVA's first version), or "pixel_shuffle" (r x r
            patches to one token, LayerNorm, Linear, SwiGLU, Linear; Aya Vision's, arXiv 2505.08751).
        pixel_shuffle: r of the latter.
        image_token: Placeholder in the text.
        seed: Of the projector's weights.

    Returns:
        The model, in eval mode; projector in the language model's dtype.

    Raises:
        InputError: For a part or a choice that cannot be combined.
    """
    _check_llm(llm)
    # Before anything is changed: a refused model leaves tokenizer and language model as they were.
    check_choices(
        vision.config,
        feature_layer=feature_layer,
        feature_select=feature_select,
        projector=projector,
        pixel_shuffle=pixel_shuffle,
    )
    choose_padding(tokenizer)
    image_token_id = _add_image_token(llm, tokenizer, image_token)
    tied = _settle_tie(llm)
    # vLLM builds the language model by this name; transformers' own configs have it only where a folder was read.
    llm.config.architectures = [type(llm).__name__]
    kind, config = llava_config(
        vision.config,
        # The LLM's own object: its vocabulary size has just grown with the embeddings.
        llm.config,
        feature_layer=feature_layer,
        feature_select=feature_select,
        projector=projector,
        pixel_shuffle=pixel_shuffle,
        image_token_id=image_token_id,
        tie_word_embeddings=tied,
        dtype=llm.dtype,
    )
    # On the meta device the placeholders cost nothing; every one of them is replaced below.
    with torch.device("meta"):
        model = kind(config)
    _check_base(model.model.language_model, llm)
    model.model.vision_tower = vision
    model.model.language_model = llm.base_model
    # The layer itself: a tied weight stays one tensor with the embeddings.
    model.lm_head = llm.get_output_embeddings()
    new_projector(model, projector, seed)
    model.generation_config = llm.generation_config
    settle_generation(model, tokenizer)
    # An empty language model is one on purpose.
    kept = [*model.parameters(), *model.buffers()]
    assert llm.device.type == "meta" or not any(p.is_meta for p in kept), "a placeholder was left in"
    return model.eval()


def _check_base(placeholder: Any, llm: PreTrainedModel) -> None:
    """Refuse a language model whose inside transformers would build as another class on opening.

    Raises:
        InputError: With both classes.
    """
    if type(placeholder) is not type(llm.base_model):
        raise InputError(
            f"{type(llm).__name__} is built on {type(llm.base_model).__name__}, but transformers would open the product with "
            f"{type(placeholder).__name__}",
            where="llm",
            mend="choose a plain causal language model",
        )


def _settle_tie(llm: PreTrainedModel) -> bool:
    """Whether head and embeddings are one tensor; untied where transformers' LLaVA could not tie them again."""
    embed = llm.get_input_embeddings()
    # By identity and not by the configuration, which says what was wished.
    tied = llm.get_output_embeddings().weight is embed.weight
    if tied and getattr(llm.base_model, "embed_tokens", None) is not embed:
        # transformers ties by the name embed_tokens; where the LLM calls it otherwise, the head becomes its own.
        llm.get_output_embeddings().weight = nn.Parameter(embed.weight.detach().clone())
        tied = False
    # Both configs have to say it: LlavaConfig takes a True from either.
    llm.config.tie_word_embeddings = tied
    return tied


def save_mllm(
    model: VisionLanguageModel,
    processor: LlavaProcessor,
    folder: str | Path,
    *,
    meta: dict[str, Any] | None,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write the model folder: weights (the vision tower's too), processor, mmkit.json.

    Args:
        model: LoRA merged.
        processor: Of `mmkit.models.processor.build_processor`.
        folder: Made if missing.
        meta: For mmkit.json, beside ``"kind": "mllm"``; None writes none.
        state_dict: Weights gathered by an engine; the model's own if None.

    Raises:
        ValueError: When LoRA layers are still in place: other programs could not open the folder.
    """
    # An error rather than a merge: merging changes the model that is perhaps still in training.
    if has_lora(model):
        raise ValueError("the model still has LoRA layers: call merge_lora(model) first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = state_dict if state_dict is not None else model.state_dict()
    model.save_pretrained(folder, state_dict=_published_names(model, state))
    processor.save_pretrained(folder)
    if meta is not None:
        write_meta(folder, "mllm", meta)


def _published_names(model: VisionLanguageModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of the published LLaVA checkpoints.

    transformers 5 took ``vision_model`` out of the names of CLIP's and SigLIP's towers; it reads both, vLLM's towers only the
    old ones.
    """
    tower = "model.vision_tower."
    if model.config.vision_config.model_type not in _NESTED_TOWERS or any(
        name.startswith(f"{tower}vision_model.") for name in state
    ):
        return state
    return {name.replace(tower, f"{tower}vision_model.", 1): value for name, value in state.items()}


def load_mllm(
    folder: str | Path, *, dtype: torch.dtype | None = None, empty: bool = False
) -> tuple[VisionLanguageModel, LlavaProcessor, dict[str, Any]]:
    """Open a model folder.

    Args:
        folder: Of `save_mllm`.
        dtype: Of the weights; None: as they are stored.
        empty: On the meta device: shapes without weights, for a process that is given them later.

    Returns:
        Model (in eval mode), processor, and the content of mmkit.json.

    Raises:
        InputError: When the folder is no MLLM's.
    """
    meta = read_meta(folder, "mllm")
    processor = AutoProcessor.from_pretrained(folder)
    # The folder has room for one chat template only, the processor's; a later stage may ask for the LLM's own.
    if "chat_template" in meta:
        processor.tokenizer.chat_template = meta["chat_template"]
    # The class that config.json names: LLaVA's, Aya Vision's or FastVLM's.
    if not empty:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype or "auto"), processor, meta
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype or config.dtype).eval(), processor, meta


def _embed(model: VisionLanguageModel, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
    """Word embeddings with the pictures' features in place of image tokens; f[B, T, H].

    One path for batches with and without pictures. ZeRO puts gradients together, and ZeRO-3 weights, in the order in which the
    modules run; where two ranks had two orders, unlike parameters would be added up.
    """
    embeds = model.get_input_embeddings()(input_ids)
    # A frozen tower may be bfloat16 under a float32 model.
    tower_dtype = model.model.vision_tower.dtype
    blank = pixel_values is None or len(pixel_values) == 0
    if pixel_values is not None and blank and pixel_values.dim() == 3:
        pixel_values = pixel_values.new_zeros(1, *pixel_values.shape[1:])
    elif pixel_values is None or blank:
        size = image_size(model.config.vision_config)
        # One blank picture, not one a row as LLaVA does: the gradient is zero either way, the tower's work is not.
        pixel_values = torch.zeros(1, 3, size, size, device=input_ids.device)
    if pixel_values.dim() == 4:
        found = model.get_image_features(pixel_values.to(tower_dtype), return_dict=True).pooler_output
        features = torch.cat(tuple(found)).to(embeds.dtype)
    else:
        features = model.model.multi_modal_projector(pixel_values.to(embeds.dtype)).flatten(0, -2)
    if blank:
        # Zero times and not detached: the graph must reach the projector. One number is enough for that.
        return embeds + 0.0 * features.mean()
    places = model.model.get_placeholder_mask(input_ids, inputs_embeds=embeds, image_features=features)
    return embeds.masked_scatter(places, features)


class _Reached(Exception):
    """The projector was reached, with these features."""

    def __init__(self, features: Tensor) -> None:
        self.features = features


def tower_features(model: VisionLanguageModel, pixel_values: Tensor) -> Tensor:
    """What the projector is given for pictures, whichever class computes it: f[I, 3, S, S] -> f[I, N, D]."""

    def leave(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        raise _Reached(arguments[0])

    # The classes differ in which states they take and which tokens they drop; what arrives here is the same in all.
    hook = model.model.multi_modal_projector.register_forward_pre_hook(leave)
    try:
        model.get_image_features(pixel_values, return_dict=True)
    except _Reached as reached:
        return reached.features
    finally:
        hook.remove()
    raise AssertionError("the projector was not called")


def llava_loss_sum(
    model: VisionLanguageModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    pixel_values: Tensor | None,
    document_lengths: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy over supervised tokens, logits made at those positions only.

    Text-only batches run a blank picture through tower and projector and add its features times zero, so that every
    trainable parameter gets a gradient and collectives on all ranks match (facts/llava.md 1.11, the ZeRO-3 hang).

    Args:
        model: The model, LoRA or not.
        input_ids: i64[B, T], image tokens expanded.
        attention_mask: i64[B, T], 1 for true tokens; None with ``document_lengths``.
        labels: i64[B, T], aligned with ``input_ids`` (not shifted); -100 where nothing is learnt.
        pixel_values: f[I, 3, S, S], the pictures of the rows that have one, in order; None or I = 0 for text only. Or f[I, N, D],
            what the tower gave for them before (`tower_features`); then it does not run.
        document_lengths: Tokens of the documents of one packed row (B = 1); the model must `allow_packing`. The first label of
            each must be -100: nothing of the document before predicts it.

    Returns:
        f32[] loss sum, i64[] number of supervised tokens.

    Raises:
        ValueError: When image tokens and image features do not match in number (from transformers).
    """
    how: dict[str, Any] = {"attention_mask": attention_mask}
    if document_lengths is not None:
        how = packed_arguments(document_lengths, input_ids.device)
    embeds = _embed(model, input_ids, pixel_values)
    out = model.model(inputs_embeds=embeds, use_cache=False, **how)
    # Position t predicts token t + 1.
    targets = labels[:, 1:]
    chosen = targets != -100
    # Most positions are image or question: full logits at 2048 x 32000 would take 655 MB a sequence (performance.md 6).
    hidden, wanted = out.last_hidden_state[:, :-1][chosen], targets[chosen]
    if isinstance(model.lm_head, TokenLossHead):
        return model.lm_head(hidden, wanted), chosen.sum()
    # A sum: of no tokens it is 0 with a gradient, where a mean would be NaN.
    return F.cross_entropy(model.lm_head(hidden).float(), wanted, reduction="sum"), chosen.sum()
