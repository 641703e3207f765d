"""Any encoder as a vision tower of transformers, with the same hidden states, so that LLaVA opens it without mmkit.

Three layouts cover the plain ViTs: SigLIP's (SuperClass, SigLIP, gap), CLIP's (class token, norm before the blocks: OpenAI,
open_clip, DataComp) and DINOv2's (class token, no norm before; with or without layer scale: DINOv2, DeiT, AugReg). A Hugging
Face tower comes through timm and leaves in its own class, weight for weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model
from transformers.modeling_utils import PreTrainedModel

from mmkit.encoders.siglip import (
    activation_name,
    block_difference,
    block_settings,
    block_state,
    build_siglip,
    final_norm,
    is_gated,
)
from mmkit.encoders.vit import VisionEncoder
from mmkit.errors import InputError
from mmkit.models.timm_tower import wrap_timm


def vision_tower(encoder: VisionEncoder) -> PreTrainedModel:
    """A transformers vision model whose ``hidden_states[-k]`` are the encoder's tokens after the k-th block from the end.

    Class tokens stay in front; `prefix_tokens` says how many there are.

    Args:
        encoder: Any encoder that mmkit opens; its picture size becomes the tower's.

    Returns:
        ``SiglipVisionModel``, ``CLIPVisionModel``, ``Dinov2Model``, or timm's model in transformers' wrapper (which has no
        hidden states that LLaVA could read: see `mmkit.models.timm_tower`). In eval mode, in the encoder's dtype.

    Raises:
        InputError: Register tokens, or a tower that no class of transformers computes.
    """
    if block_difference(encoder) is not None:
        return wrap_timm(encoder)
    tower = encoder.backbone
    has_class = tower.cls_token is not None
    # LLaVA in transformers drops the first token or none: registers would pass for patches, and the grid would not be square.
    if encoder.num_prefix_tokens > int(has_class):
        raise InputError(
            f"it has {encoder.num_prefix_tokens - int(has_class)} register tokens, and LlavaForConditionalGeneration drops "
            "one class token at most",
            where=f"encoder {encoder.architecture}",
            mend="use the same family without registers (vit_*_patch14_dinov2, facebook/dinov2-*)",
        )
    pre_norm = not isinstance(tower.norm_pre, nn.Identity)
    gated = is_gated(tower.blocks[0].mlp)
    if has_class and pre_norm and not gated:
        return _clip(encoder)
    if has_class and not pre_norm:
        return _dinov2(encoder)
    if not has_class and not pre_norm and not gated:
        return build_siglip(encoder)
    # What is left: a norm before the blocks without class token, or gated MLPs outside DINOv2's layout.
    return wrap_timm(encoder)


def prefix_tokens(vision_config: Any) -> int:
    """Class tokens in front of the patches in the hidden states of a vision config."""
    # Of the towers that mmkit builds, SigLIP's layout and convolutional ones have none.
    return int("siglip" not in vision_config.model_type and vision_config.model_type != "timm_wrapper")


def idle_blocks(tower: PreTrainedModel, feature_layer: int | list[int]) -> list[nn.Module]:
    """The blocks behind the last hidden state that is used: one of 24 in LLaVA-1.5, whose features come from before the last.

    Args:
        tower: Of a LLaVA model.
        feature_layer: ``vision_feature_layer`` of its config: places in the list of hidden states, the embeddings first.

    Returns:
        None of them where the tower keeps its blocks in another way than transformers' own (timm's wrapper).
    """
    count = getattr(tower.config, "num_hidden_layers", None)
    stacks = [module for module in tower.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if len(stacks) != 1:
        return []
    used = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    return list(stacks[0])[max(layer % (len(stacks[0]) + 1) for layer in used) :]


@contextlib.contextmanager
def passed_through(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let these blocks hand on what they are given. They stay in their places, since hidden states are counted by them."""

    def hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    for block in blocks:
        block.forward = hand_on
    try:
        yield
    finally:
        for block in blocks:
            # The attribute of this object; its class still has its own.
            del block.forward


def _clip(encoder: VisionEncoder) -> CLIPVisionModel:
    """CLIP's layout; layer scale, which CLIP has no place for, goes into the weights before it."""
    tower = encoder.backbone
    # The width of a projection that is no part of this model says that there is none.
    config = CLIPVisionConfig(**block_settings(encoder), projection_dim=encoder.width)
    positions = _positions(tower)
    if tower.patch_embed.proj.bias is not None:
        # CLIP's patches have no bias; added to each patch's position it does the same.
        positions[1:] += tower.patch_embed.proj.bias
    state = {
        "embeddings.class_embedding": tower.cls_token[0, 0],
        "embeddings.patch_embedding.weight": tower.patch_embed.proj.weight,
        "embeddings.position_embedding.weight": positions,
        "pre_layrnorm.weight": tower.norm_pre.weight,
        "pre_layrnorm.bias": tower.norm_pre.bias,
        **block_state(tower),
    }
    return _filled(CLIPVisionModel(config), state, tower)


def _dinov2(encoder: VisionEncoder) -> Dinov2Model:
    """DINOv2's layout; a tower without layer scale gets ones, which change nothing."""
    tower = encoder.backbone
    block = tower.blocks[0]
    gated = is_gated(block.mlp)
    config = Dinov2Config(
        hidden_size=encoder.width,
        mlp_ratio=_mlp_ratio(encoder),
        num_hidden_layers=len(tower.blocks),
        num_attention_heads=block.attn.num_heads,
        image_size=encoder.image_size,
        patch_size=tower.patch_embed.patch_size[0],
        hidden_act="silu" if gated else activation_name(block.mlp.act),
        layer_norm_eps=block.norm1.eps,
        qkv_bias=block.attn.qkv.bias is not None,
        use_swiglu_ffn=gated,
        use_mask_token=False,
    )
    state: dict[str, Tensor] = {
        "embeddings.cls_token": tower.cls_token,
        "embeddings.position_embeddings": _positions(tower)[None],
        "layernorm.weight": final_norm(tower).weight,
        "layernorm.bias": final_norm(tower).bias,
    }
    _copy(state, "embeddings.patch_embeddings.projection", tower.patch_embed.proj)
    for index, block in enumerate(tower.blocks):
        name = f"encoder.layer.{index}"
        for kind, packed in block.attn.qkv.named_parameters():
            # timm stacks q, k and v in this order along the rows.
            for part, value in zip("qkv", packed.chunk(3), strict=True):
                state[f"{name}.attention.{part}_proj.{kind}"] = value
        fc1 = ("mlp.fc1",) if not gated else ("mlp.gate_proj", "mlp.up_proj")
        for kind, packed in block.mlp.fc1.named_parameters():
            for part, value in zip(fc1, packed.chunk(len(fc1)), strict=True):
                state[f"{name}.{part}.{kind}"] = value
        for theirs, ours in (
            ("norm1", block.norm1),
            ("norm2", block.norm2),
            ("attention.o_proj", block.attn.proj),
            ("mlp.down_proj" if gated else "mlp.fc2", block.mlp.fc2),
        ):
            _copy(state, f"{name}.{theirs}", ours)
        for number, scale in ((1, block.ls1), (2, block.ls2)):
            ones = block.norm1.weight.new_ones(encoder.width)
            state[f"{name}.layer_scale{number}.lambda1"] = ones if isinstance(scale, nn.Identity) else scale.gamma
    return _filled(Dinov2Model(config), state, tower)


def _positions(tower: Any) -> Tensor:
    """The position table f[1 + N, D], the class token's row first."""
    table: Tensor = tower.pos_embed[0].detach().clone()
    if not tower.no_embed_class:
        return table
    # Here the class token has no position of its own, which is a position of zeros.
    return torch.cat([table.new_zeros(1, table.shape[1]), table])


def _mlp_ratio(encoder: VisionEncoder) -> int:
    """The whole number from which DINOv2's config computes the MLP's width.

    Raises:
        InputError: There is none: transformers' config holds no width and takes no fraction.
    """
    mlp = encoder.backbone.blocks[0].mlp
    hidden, width = mlp.fc1.out_features, encoder.width
    if not is_gated(mlp) and hidden % width == 0:
        return int(hidden // width)
    # Two thirds of the usual width (arXiv 2002.05202), rounded up to eights; fc1 holds gate and value.
    found = [r for r in range(1, 17) if (int(width * r * 2 / 3) + 7) // 8 * 8 == hidden // 2]
    if is_gated(mlp) and found:
        return found[0]
    raise InputError(
        f"its MLP is {hidden / width:g} times as wide as its tokens, and transformers' Dinov2Config takes whole numbers only",
        where=f"encoder {encoder.architecture}",
        mend="use a tower with an MLP ratio such as 4",
    )


def _copy(state: dict[str, Tensor], name: str, layer: nn.Module) -> None:
    """Put a layer's parameters into a state under another name."""
    for kind, value in layer.named_parameters():
        state[f"{name}.{kind}"] = value


def _filled(model: PreTrainedModel, state: dict[str, Tensor], tower: Any) -> Any:
    """The model with these weights, in the tower's dtype and on its device, in eval mode."""
    # Strict by default: a weight without a place would leave a random one behind, unnoticed.
    model.load_state_dict({name: value.detach() for name, value in state.items()})
    parameter = next(tower.parameters())
    return model.to(device=parameter.device, dtype=parameter.dtype).eval()
