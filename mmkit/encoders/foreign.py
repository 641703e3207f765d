"""Towers of transformers and open_clip as timm models: their sizes read from the config, their weights renamed."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from mmkit.config import CLIP_MEAN, CLIP_STD
from mmkit.encoders.vit import VisionEncoder, create_backbone
from mmkit.errors import InputError
from mmkit.files import read_json

log = logging.getLogger(__name__)

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Pixels in -1 to 1, as SigLIP and Google's ViT take them.
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CLIP = (CLIP_MEAN, CLIP_STD)


class _Family(NamedTuple):
    """One kind of Hugging Face tower: what its config does not say, and what its folder may not say.

    Attributes:
        tag: What timm puts behind the patch size in the name of such a model.
        args: Arguments of timm's ViT.
        statistics: Channel means and deviations of the published weights.
    """

    tag: str
    args: dict[str, Any]
    statistics: tuple[tuple[float, ...], tuple[float, ...]]


_TOKEN = {"class_token": True, "global_pool": "token"}
_MAP = {"class_token": False, "global_pool": "map", "fc_norm": False}
_FAMILIES = {
    # What these configs leave unsaid. init_values only makes the layer-scale weights exist; their values come with the
    # state.
    "clip_vision_model": _Family("clip_", {**_TOKEN, "pre_norm": True}, _CLIP),
    "siglip_vision_model": _Family("siglip_", _MAP, _HALF),
    "dinov2": _Family("dinov2", {**_TOKEN, "init_values": 1e-5}, _IMAGENET),
    "dinov2_with_registers": _Family("reg4_dinov2", {**_TOKEN, "init_values": 1e-5, "no_embed_class": True}, _IMAGENET),
    "vit": _Family("", _TOKEN, _HALF),
}
_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1152: "so400m", 1280: "huge", 1408: "giant", 1536: "giant"}
# transformers' names of activations, and timm's.
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}

# Names in the towers of transformers, of several releases, in the order in which they are replaced.
_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^embeddings\.(class_embedding|cls_token)$", "cls_token"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.patch_embeddings?\.(projection\.)?", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
        (r"^pre_layrnorm\.", "norm_pre."),
        (r"^(post_layernorm|layernorm)\.", "norm."),
        (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
        (r"\.(self_attn|attention\.attention|attention)\.(q|k|v)(_proj|uery|ey|alue)\.", r".attn.\2."),
        (r"\.(self_attn\.out_proj|attention\.o_proj|attention\.output\.dense)\.", ".attn.proj."),
        (r"\.(layer_norm1|layernorm_before)\.", ".norm1."),
        (r"\.(layer_norm2|layernorm_after)\.", ".norm2."),
        (r"^(blocks\.\d+)\.(intermediate\.dense)\.", r"\1.mlp.fc1."),
        (r"^(blocks\.\d+)\.(output\.dense)\.", r"\1.mlp.fc2."),
        (r"\.mlp\.weights_in\.", ".mlp.fc1."),
        (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.fc2."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"^head\.probe$", "attn_pool.latent"),
        (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
        (r"^head\.attention\.", "attn_pool."),
        (r"^head\.layernorm\.", "attn_pool.norm."),
        (r"^head\.mlp\.", "attn_pool.mlp."),
    )
)


def load_huggingface(name: str) -> VisionEncoder:
    """A vision tower of transformers: CLIP, SigLIP, DINOv2 (with registers too) or ViT.

    The feature is what the model pools: the class token after the final norm, or SigLIP's attention pooling. Projections
    into a space shared with text, and ViT's tanh pooler, are left out.

    Args:
        name: Folder or hub name.

    Returns:
        The encoder, in the dtype of the weights.

    Raises:
        InputError: No such model, or one of another kind.
    """
    from transformers import AutoConfig, AutoModel

    where = f"hf:{name}"
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        # A whole CLIP or SigLIP will do as well: its tower is taken out below.
        if kind.removesuffix("_vision_model") not in ("clip", "siglip", *_FAMILIES):
            raise InputError(f"no tower that mmkit can read: {kind}", where=where, mend="give CLIP, SigLIP, DINOv2 or ViT")
        # auto: weights saved in half precision stay so.
        model = AutoModel.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        # InputError is a ValueError, and names the reason already.
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot be opened: {_first_line(error)}", where=where, mend="check name and network") from error
    # Some releases of transformers put the tower below this name in the vision models too.
    model = getattr(model, "vision_model", model)
    # The config of the tower, not that of a model with text, whose sizes lie one level deeper.
    config = model.config
    family = _FAMILIES[config.model_type]
    architecture, args = timm_arguments(config)
    mean, std = _statistics(name, family, where)
    return _build(architecture, args, timm_state(model.state_dict()), image_size=args["img_size"], mean=mean, std=std)


def timm_arguments(config: Any) -> tuple[str, dict[str, Any]]:
    """Name and arguments with which timm builds the tower of a transformers vision config.

    Raises:
        InputError: timm's ViT has no such activation, picture or norm.
    """
    where = f"hf {config.model_type}"
    family = _FAMILIES[config.model_type]
    size, patch, width = _side(config.image_size, where), _side(config.patch_size, where), config.hidden_size
    gated = getattr(config, "use_swiglu_ffn", False)
    # DINOv2 states the ratio, the others the size.
    hidden = getattr(config, "intermediate_size", None) or int(width * config.mlp_ratio)
    if gated:
        # Gate and value are one matrix in timm, each two thirds of the usual size (arXiv 2002.05202), rounded up to 8.
        hidden = 2 * ((int(hidden * 2 / 3) + 7) // 8 * 8)
    elif config.hidden_act not in ACTIVATIONS:
        raise InputError(f"activation {config.hidden_act!r} is none of {', '.join(ACTIVATIONS)}", where=where)
    args: dict[str, Any] = {
        **family.args,
        "num_classes": 0,
        "img_size": size,
        "patch_size": patch,
        "embed_dim": width,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": _ratio(hidden, width),
        # CLIP and SigLIP have no such key, and always biases.
        "qkv_bias": getattr(config, "qkv_bias", True),
    }
    # SigLIP without its pooling head, as mmkit exports it, has the mean of its tokens as feature.
    if not getattr(config, "vision_use_head", True):
        args["global_pool"] = "avg"
    if config.model_type == "dinov2_with_registers":
        args["reg_tokens"] = config.num_register_tokens
    if gated:
        # SwiGLU and its SiLU cannot be named in JSON; this timm model has both.
        return "vit_giant_patch14_dinov2", args
    args["act_layer"] = ACTIVATIONS[config.hidden_act]
    return _architecture(config, family, args), args


def _architecture(config: Any, family: _Family, args: dict[str, Any]) -> str:
    """Timm's own name for the tower if it has one, else a name with the right epsilon: the one thing JSON cannot say."""
    eps = config.layer_norm_eps
    quick = "quickgelu_" if args["act_layer"] == "quick_gelu" else ""
    size = args["img_size"] if family.tag != "clip_" else 224
    tail = family.tag if "dinov2" in family.tag else f"{family.tag}{quick}{size}"
    name = f"vit_{_WIDTHS.get(args['embed_dim'])}_patch{args['patch_size']}_{tail}"
    clip = family.tag == "clip_"
    # In timm the CLIP models have epsilon 1e-5 built in and all the others 1e-6; an argument for it JSON cannot hold.
    if timm.is_model(name) and (eps == 1e-5) == clip:
        return name
    if eps == 1e-5:
        return "vit_base_patch16_clip_224"
    if eps != 1e-6:
        log.warning("%s: its norms have epsilon %g, timm's have 1e-6, as the published JAX weights had", config.model_type, eps)
    return "vit_base_patch16_224"


def timm_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a transformers vision tower under timm's names.

    Args:
        state: Its state dict, names beginning with ``embeddings.``, ``encoder.`` or ``layers.`` and so on.

    Returns:
        The weights of timm's ``VisionTransformer``; q, k, v are joined to qkv[3D, D].
    """
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        # Mask tokens and ViT's tanh pooler take no part in the features.
        if name.endswith(("mask_token", "position_ids")) or name.startswith("pooler."):
            continue
        for pattern, replacement in _RENAMES:
            name = pattern.sub(replacement, name)
        named[name] = value
    _join(named, ("attn.q", "attn.k", "attn.v"), "attn.qkv")
    # SwiGLUPacked splits fc1's output into the gate and what it lets through, in this order.
    _join(named, ("mlp.gate_proj", "mlp.up_proj"), "mlp.fc1")
    for kind in ("weight", "bias"):
        packed = named.pop(f"attn_pool.in_proj_{kind}", None)
        if packed is not None:
            query, rest = packed.split([len(packed) // 3, len(packed) // 3 * 2])
            named |= {f"attn_pool.q.{kind}": query, f"attn_pool.kv.{kind}": rest}
    # transformers has embeddings of [N, D] or vectors of [D] where timm has [1, N, D].
    for name in ("pos_embed", "cls_token"):
        if name in named:
            named[name] = named[name].reshape(1, -1, named[name].shape[-1])
    if "reg_token" in named:
        # In timm no position belongs to class and register tokens here, so the class token carries its own.
        named["cls_token"] = named["cls_token"] + named["pos_embed"][:, :1]
        named["pos_embed"] = named["pos_embed"][:, 1:]
    return named


def load_open_clip(name: str) -> VisionEncoder:
    """The image tower of an open_clip model, without its projection into the shared space.

    Args:
        name: ``MODEL:TAG`` or ``MODEL:FILE`` as open_clip names them, or ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``.

    Returns:
        The encoder.

    Raises:
        InputError: open_clip does not know it, or its tower is no ViT and no timm model.
    """
    import open_clip

    where = f"open_clip:{name}"
    # These carry weights and settings in one place, so there is no tag behind a colon.
    whole = name.startswith(("local-dir:", "hf-hub:"))
    model_name, _, pretrained = (name, "", "") if whole else name.partition(":")
    if not whole and not pretrained:
        raise InputError("no weights named", where=where, mend="write open_clip:MODEL:TAG or open_clip:MODEL:FILE")
    try:
        with torch.random.fork_rng(devices=[]):
            model = open_clip.create_model(model_name, pretrained=pretrained or None)
        config = open_clip.get_model_config(model_name)
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(
            f"cannot be opened: {_first_line(error)}", where=where, mend="see open_clip.list_pretrained()"
        ) from error
    tower, vision = model.visual, config["vision_cfg"]
    mean, std = open_clip.get_model_preprocess_cfg(model)["mean"], open_clip.get_model_preprocess_cfg(model)["std"]
    size = _side(tower.image_size, where)
    if vision.get("timm_model_name"):
        architecture, args, state = _timm_trunk(tower, vision, where)
    elif type(tower).__name__ == "VisionTransformer":
        architecture, args, state = _own_tower(tower, where)
    else:
        raise InputError(f"its tower is a {type(tower).__name__}, no ViT", where=where, mend="use timm's weights of that model")
    return _build(architecture, args, state, image_size=size, mean=mean, std=std)


def _timm_trunk(tower: Any, vision: dict[str, Any], where: str) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Name, arguments and weights of the timm model inside an open_clip tower."""
    if vision.get("timm_pool") in ("abs_attn", "rot_attn"):
        raise InputError("its pooling is no part of the timm model", where=where, mend="use timm's weights of that model")
    name, args = vision["timm_model_name"], dict[str, Any]()
    if name.startswith("local-dir:"):
        config = read_json(Path(name.removeprefix("local-dir:")) / "config.json")
        name, args = config["architecture"], config.get("model_args", {})
    # open_clip chooses the pooling after the model is built; here it is one of the arguments.
    pool = {"global_pool": vision["timm_pool"]} if vision.get("timm_pool", "avg") else {}
    # num_classes=0 below builds no classifier, and the state has to fit strictly.
    state = {key: value for key, value in tower.trunk.state_dict().items() if not _is_classifier(tower.trunk, key)}
    return name.partition(".")[0], {**args, **pool, "num_classes": 0}, state


def _is_classifier(trunk: Any, key: str) -> bool:
    """Whether a weight belongs to the classifier, which serves as projection in some open_clip models."""
    names = trunk.pretrained_cfg.get("classifier") or ()
    return key.startswith(tuple(f"{name}." for name in ([names] if isinstance(names, str) else names)))


def _own_tower(tower: Any, where: str) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Name, arguments and weights of timm's form of open_clip's ``VisionTransformer``."""
    block = tower.transformer.resblocks[0]
    # Refused, not approximated: features that are almost the model's would pass for its own.
    if tower.attn_pool is not None or tower.pool_type not in ("tok", "avg") or type(block).__name__ != "ResidualAttentionBlock":
        raise InputError("its blocks or its pooling have no like in timm", where=where, mend="choose a plain ViT of open_clip")
    plain = type(tower.ln_pre).__name__ == "Identity"
    width, quick = tower.conv1.out_channels, type(block.mlp.gelu).__name__ == "QuickGELU"
    args: dict[str, Any] = {
        "num_classes": 0,
        "class_token": True,
        "img_size": _side(tower.image_size, where),
        "patch_size": _side(tower.patch_size, where),
        "embed_dim": width,
        "depth": len(tower.transformer.resblocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": _ratio(block.mlp.c_fc.out_features, width),
        "pre_norm": not plain,
        "global_pool": {"tok": "token", "avg": "avg"}[tower.pool_type],
        "fc_norm": bool(tower.final_ln_after_pool),
        "act_layer": "quick_gelu" if quick else "gelu",
        # Makes the layer-scale weights exist; their values come with the state.
        "init_values": 1e-5 if hasattr(block.ls_1, "gamma") else None,
    }
    architecture = f"vit_{_WIDTHS.get(width)}_patch{args['patch_size']}_clip_{'quickgelu_' if quick else ''}224"
    if tower.ln_post.eps != 1e-5 or not timm.is_model(architecture):
        # Any name of the right epsilon will do, because the arguments say everything else.
        architecture = "vit_base_patch16_clip_224" if tower.ln_post.eps == 1e-5 else "vit_base_patch16_224"
    # timm's own converter renames OpenAI's layout; what it does not know (layer scale, norm after pooling) follows.
    backbone = create_backbone(architecture, args)
    state = checkpoint_filter_fn({f"visual.{key}": value for key, value in tower.state_dict().items()}, backbone)
    state = {re.sub(r"\.ls_([12])\.", r".ls\1.", key): value for key, value in state.items() if not key.startswith("head.")}
    if plain:
        # timm leaves the bias of the patches out only together with the norm that follows them.
        state["patch_embed.proj.bias"] = torch.zeros(width)
    if args["fc_norm"]:
        state = {re.sub(r"^norm\.", "fc_norm.", key): value for key, value in state.items()}
    return architecture, args, state


def _build(
    architecture: str, args: dict[str, Any], state: dict[str, Tensor], *, image_size: int, mean: Any, std: Any
) -> VisionEncoder:
    """An encoder with these weights, in their dtype; every weight has to find its place."""
    # The random weights are thrown away; they must not move the caller's generator.
    with torch.random.fork_rng(devices=[]):
        backbone = create_backbone(architecture, args)
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    # In the dtype of the weights: a cast would double the memory and gain no precision.
    backbone.to(dtype).load_state_dict(state)
    return VisionEncoder(backbone, architecture=architecture, model_args=args, image_size=image_size, mean=mean, std=std)


def _statistics(name: str, family: _Family, where: str) -> tuple[Any, Any]:
    """Channel means and deviations from the model's preprocessor, or those of its family."""
    from transformers.utils import cached_file

    # Many folders hold weights without a preprocessor; that is no error, but is told below.
    file = cached_file(
        name,
        "preprocessor_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    settings = read_json(Path(file)) if file is not None else {}
    if "image_mean" in settings and "image_std" in settings:
        return settings["image_mean"], settings["image_std"]
    log.warning("%s: no preprocessor_config.json with mean and std; those of the published models are taken", where)
    return family.statistics


def _join(named: dict[str, Tensor], parts: tuple[str, ...], whole: str) -> None:
    """Join layers that timm has as one, in every block, weights and biases."""
    for first in [name for name in named if f".{parts[0]}." in name]:
        names = [first.replace(f".{parts[0]}.", f".{part}.") for part in parts]
        named[first.replace(f".{parts[0]}.", f".{whole}.")] = torch.cat([named.pop(name) for name in names])


def _ratio(hidden: int, width: int) -> float:
    """The MLP ratio from which timm, rounding down, gets this hidden size."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.5) / width


def _side(size: Any, where: str) -> int:
    """The side of a square given as a number or a pair."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise InputError(f"pictures or patches of {tuple(size)} are not square", where=where, mend="use a square model")
    return int(sides.pop())


def _first_line(error: BaseException) -> str:
    """The first line of a message; the libraries write essays."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
