"""From a SuperClass tower to transformers' `SiglipVisionModel`, weight for weight."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from mmkit.encoders.vit import VisionEncoder
from mmkit.errors import InputError


def to_siglip(encoder: VisionEncoder) -> SiglipVisionModel:
    """Copy a tower into a `SiglipVisionModel` that computes the same.

    ``last_hidden_state`` equals ``encoder.tokens(x)`` and ``hidden_states[-k]`` equals ``encoder.tokens(x, -k)``, up to
    the order of float additions in attention.

    Args:
        encoder: A tower in SigLIP's layout (`mmkit.encoders.vit.SUPERCLASS_LAYOUT`).

    Returns:
        The transformers model, without attention-pooling head, in eval mode, with the tower's dtype and device.

    Raises:
        InputError: If the tower is not in that layout; names the reason.
    """
    reason = layout_difference(encoder)
    if reason is not None:
        raise InputError(
            f"the tower is not in SigLIP's layout: {reason}",
            where=f"encoder {encoder.architecture}",
            mend="train it with layout: superclass, or use it through its own Hugging Face class",
        )
    return build_siglip(encoder)


def build_siglip(encoder: VisionEncoder) -> SiglipVisionModel:
    """The `SiglipVisionModel` with a tower's patch embedding, positions, blocks and final norm; pooling is left out.

    Args:
        encoder: A tower for which `block_difference` is None, without prefix tokens and without a norm before the blocks.

    Returns:
        The transformers model, in eval mode, with the tower's dtype and device; its ``hidden_states`` are the tower's.
    """
    tower = encoder.backbone
    # Without the pooling head that SigLIP's default has.
    config = SiglipVisionConfig(**block_settings(encoder), vision_use_head=False)
    model = SiglipVisionModel(config)
    # Releases of transformers differ in whether the tower sits under this prefix.
    prefix = "vision_model." if any(k.startswith("vision_model.") for k in model.state_dict()) else ""
    # Strict by default: a weight without a place would leave a random one behind, unnoticed.
    model.load_state_dict({prefix + name: value for name, value in _siglip_state(tower).items()})
    # transformers builds in float32 on the CPU.
    parameter = next(tower.parameters())
    return model.to(device=parameter.device, dtype=parameter.dtype).eval()


def block_settings(encoder: VisionEncoder) -> dict[str, Any]:
    """Sizes of a tower in the words that SigLIP's and CLIP's configs share."""
    tower = encoder.backbone
    block = tower.blocks[0]
    return {
        "hidden_size": encoder.width,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(tower.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": encoder.image_size,
        "patch_size": tower.patch_embed.patch_size[0],
        # timm's exact GELU and epsilon must be named: the defaults are others.
        "hidden_act": activation_name(block.mlp.act),
        "layer_norm_eps": block.norm1.eps,
    }


def layout_difference(encoder: VisionEncoder) -> str | None:
    """Say what keeps a tower from being a SigLIP tower, or None if nothing does."""
    reason = block_difference(encoder)
    if reason is not None:
        return reason
    tower = encoder.backbone
    present = {
        "it has a class token": tower.cls_token is not None,
        "it has register tokens": tower.num_prefix_tokens > int(tower.cls_token is not None),
        "it has a norm before the blocks": not isinstance(tower.norm_pre, nn.Identity),
        "its final norm comes after pooling": not isinstance(tower.norm, nn.LayerNorm),
        f"it pools by {tower.global_pool!r}, not by the mean": tower.global_pool != "avg",
        "it has layer scale": not isinstance(getattr(tower.blocks[0], "ls1", None), nn.Identity),
        "its MLP is gated": is_gated(tower.blocks[0].mlp),
    }
    return next((reason for reason, true in present.items() if true), None)


def block_difference(encoder: VisionEncoder) -> str | None:
    """Say what keeps a tower's tokens from coming out of a ViT of transformers, or None if nothing does.

    Prefix tokens, pooling, layer scale, gated MLPs and the norms around the blocks are for the caller to look at.
    """
    tower = encoder.backbone
    # By name: subclasses and timm's other families share attributes and compute otherwise.
    if type(tower).__name__ != "VisionTransformer" or not hasattr(tower, "pos_embed"):
        return f"it is a {type(tower).__name__}, not a plain ViT"
    block = tower.blocks[0]
    # All blocks are built alike, so the first speaks for them. Any of these would change the numbers or leave weights
    # without a place, and transformers would not complain.
    present = {
        "it has no position table": tower.pos_embed is None,
        f"its patches come out of a {type(tower.patch_embed).__name__}": type(tower.patch_embed).__name__ != "PatchEmbed",
        f"its blocks are {type(block).__name__}": type(block).__name__ != "Block",
        f"its MLP is a {type(block.mlp).__name__}": type(block.mlp).__name__ != "Mlp" and not is_gated(block.mlp),
        "it normalises queries and keys": not isinstance(getattr(block.attn, "q_norm", None), nn.Identity),
        "it has a norm inside attention": not isinstance(getattr(block.attn, "norm", nn.Identity()), nn.Identity),
        "it has a norm inside its MLP": not isinstance(getattr(block.mlp, "norm", nn.Identity()), nn.Identity),
        "its attention is gated": getattr(block.attn, "gate", None) is not None,
        "its heads are not as wide as its tokens": block.attn.qkv.weight.shape[0] != 3 * encoder.width,
        f"its norms are {type(block.norm1).__name__}": not isinstance(block.norm1, nn.LayerNorm),
    }
    reason = next((reason for reason, true in present.items() if true), None)
    # Asked last: other kinds of MLP have no such attribute.
    if reason is None and not is_gated(block.mlp) and activation_name(block.mlp.act) is None:
        return "its activation is unknown to transformers"
    return reason


def is_gated(mlp: nn.Module) -> bool:
    """Whether an MLP is timm's packed SwiGLU (gate and value in one matrix, the gate first), as DINOv2's largest has it."""
    return type(mlp).__name__ == "GluMlp" and isinstance(mlp.act, nn.SiLU) and not mlp.gate_last


def activation_name(act: nn.Module, library: Literal["transformers", "timm"] = "transformers") -> str | None:
    """A library's name of a timm activation, or None; exact GELU and its tanh form differ by up to 5e-4."""
    # By class, because timm's GELUTanh and QuickGELU are modules of its own.
    name = type(act).__name__
    if isinstance(act, nn.GELU):
        name = "GELU" if act.approximate == "none" else "GELUTanh"
    theirs = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu"}.get(name)
    if library == "transformers":
        return theirs
    # What neither knows keeps the name of its class, so that two different ones never look alike.
    return "gelu_tanh" if name == "GELUTanh" else theirs or name


def _siglip_state(tower: Any) -> dict[str, Tensor]:
    """The tower's weights under the names of `SiglipVisionModel`."""
    # timm's table is [1, N, D], transformers' an embedding of [N, D].
    state: dict[str, Tensor] = {"embeddings.position_embedding.weight": tower.pos_embed[0].detach()}
    _put(state, "embeddings.patch_embedding", tower.patch_embed.proj.weight.detach(), tower.patch_embed.proj.bias)
    return {**state, **block_state(tower)}


def block_state(tower: Any) -> dict[str, Tensor]:
    """Blocks and final norm under the names that SigLIP and CLIP share; qkv float[3D, D] is split into three."""
    state: dict[str, Tensor] = {}
    for index, block in enumerate(tower.blocks):
        name = f"encoder.layers.{index}"
        # timm stacks q, k and v in this order along the rows.
        weights = block.attn.qkv.weight.chunk(3)
        # Towers may be trained without these biases (qkv_bias in model_args); _put decides what stands in.
        biases = block.attn.qkv.bias.chunk(3) if block.attn.qkv.bias is not None else (None, None, None)
        for part, weight, bias in zip("qkv", weights, biases, strict=True):
            _put(state, f"{name}.self_attn.{part}_proj", weight, bias)
        _put(state, f"{name}.self_attn.out_proj", *_scaled(block.attn.proj, block.ls1))
        _put(state, f"{name}.mlp.fc2", *_scaled(block.mlp.fc2, block.ls2))
        for theirs, ours in (("layer_norm1", block.norm1), ("layer_norm2", block.norm2), ("mlp.fc1", block.mlp.fc1)):
            _put(state, f"{name}.{theirs}", ours.weight, ours.bias)
    norm = final_norm(tower)
    _put(state, "post_layernorm", norm.weight, norm.bias)
    return {name: value.detach() for name, value in state.items()}


def final_norm(tower: Any) -> nn.LayerNorm:
    """The norm after the blocks; some towers have it behind the pooling, where a tower without pooling has no use for it."""
    norm = tower.norm if isinstance(tower.norm, nn.LayerNorm) else tower.fc_norm
    assert isinstance(norm, nn.LayerNorm), f"no final norm in a {type(tower).__name__}"
    return norm


def _scaled(layer: nn.Linear, scale: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer with the layer scale behind it multiplied in; without one, they are as they were."""
    if isinstance(scale, nn.Identity):
        return layer.weight, layer.bias
    # gamma * (W x + b) = (gamma W) x + gamma b: neither SigLIP nor CLIP has a place for gamma itself.
    gamma = scale.gamma
    return layer.weight * gamma[:, None], layer.bias * gamma if layer.bias is not None else None


def _put(state: dict[str, Tensor], name: str, weight: Tensor, bias: Tensor | None) -> None:
    """Add one layer; SigLIP has a bias everywhere, so a layer without one gets zeros."""
    state[f"{name}.weight"] = weight
    state[f"{name}.bias"] = bias if bias is not None else weight.new_zeros(len(weight))
