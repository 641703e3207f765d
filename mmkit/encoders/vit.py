"""Vision towers: a timm model behind one small interface, built in SigLIP's layout unless told otherwise."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mmkit.config import CLIP_MEAN, CLIP_STD
from mmkit.errors import InputError

Layout = Literal["superclass", "native"]

# No class token, mean over the patch tokens after the final norm: exactly what transformers' SiglipVisionModel
# computes, so a trained tower enters LLaVA and vLLM without a plug-in (see siglip.py).
SUPERCLASS_LAYOUT: dict[str, Any] = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}


class KeepPatches(nn.Module):
    """Stands where a timm ViT drops patches, and keeps those it was told to (FLIP, arXiv 2212.00794).

    It has no weights, so state dicts, saved folders and timm itself know nothing of it; without indices it does nothing.
    """

    def __init__(self, num_prefix_tokens: int) -> None:
        """Remember how many class and register tokens stand in front."""
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.keep: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Tokens with their positions, float[B, prefix + N, D], to float[B, prefix + K, D]."""
        if self.keep is None:
            return x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        # Taken out, not masked: the blocks then cost K/N of their time.
        kept = patches.gather(1, self.keep.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
        return torch.cat([prefix, kept], dim=1) if self.num_prefix_tokens else kept


class VisionEncoder(nn.Module):
    """A timm model that takes uint8 or normalised pictures and returns pooled features or patch tokens.

    Attributes:
        backbone: The timm model itself, without classifier.
        architecture: Name in timm's registry.
        model_args: Keyword arguments ``timm.create_model`` needs to build the same module again.
        image_size: Side of the square pictures, in pixels.
        width: Size D of a feature.
        num_tokens: Patch tokens N per picture.
        num_prefix_tokens: Class and register tokens in front of them.
        mean: Channel means of the training transform, pixels in 0..1.
        std: Channel standard deviations of the training transform.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        architecture: str,
        model_args: dict[str, Any],
        image_size: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        """Wrap a finished timm model; `build_encoder` is the usual way to get one."""
        super().__init__()
        self.backbone = backbone
        self.architecture = architecture
        self.model_args = dict(model_args)
        self.image_size = image_size
        self.width = int(backbone.num_features)
        self.num_prefix_tokens = int(getattr(backbone, "num_prefix_tokens", 0))
        self.num_tokens = _num_tokens(backbone, image_size)
        # Reached through backbone.patch_drop: a second name would make it a second child in every listing of modules.
        if _can_keep_patches(backbone):
            backbone.patch_drop = KeepPatches(self.num_prefix_tokens)
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        # Buffers rather than tensors made per call: a copy from the host in every step would stall the device.
        self._place_statistics(torch.device("cpu"))

    def set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take other channel means and deviations for the pixels, as weights that come from elsewhere need."""
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self._place_statistics(self.pixel_mean.device)

    def _place_statistics(self, device: torch.device) -> None:
        """Put the pixel statistics on a device, always in float32."""
        for name, values in (("pixel_mean", self.mean), ("pixel_std", self.std)):
            statistic = torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)
            # Not in state dicts: mean and std are in config.json, and weights of other libraries have no such names.
            self.register_buffer(name, statistic, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VisionEncoder:
        """Move or cast the module; the statistics follow the device but never lose precision to ``.to(bf16)``."""
        super()._apply(fn, recurse)
        # bf16 would shift every pixel by up to 0.4 % of its range; so the buffers are made anew instead of cast.
        self._place_statistics(self.pixel_mean.device)
        return self

    def normalise(self, pixels: Tensor) -> Tensor:
        """Turn uint8 pictures into the tower's input; float pictures pass as they are, up to the dtype.

        Args:
            pixels: uint8[B, 3, H, W] in 0..255, or float[B, 3, H, W] already normalised.

        Returns:
            float[B, 3, H, W] in the dtype of the weights.
        """
        # Here and not in the loader: a uint8 picture is a quarter of the bytes on its way to the device.
        if pixels.dtype == torch.uint8:
            pixels = normalise(pixels, self.pixel_mean, self.pixel_std)
        assert pixels.is_floating_point(), f"pixels must be uint8 or float, not {pixels.dtype}"
        return pixels.to(next(self.backbone.parameters()).dtype)

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        """Pooled features.

        Args:
            pixels: uint8[B, 3, H, W], or float[B, 3, H, W] already normalised.
            keep: int64[B, K], the patches of each picture that are seen, on the device of the pixels; the others are left
                out after the position embedding, before the blocks and the pooling (FLIP, arXiv 2212.00794). None: all.

        Returns:
            float[B, D].

        Raises:
            InputError: If patches are to be kept in a model that cannot leave any out.
        """
        if keep is None:
            return self.backbone(self.normalise(pixels))
        slot = self.check_patch_drop()
        assert keep.ndim == 2 and len(keep) == len(pixels), f"keep {tuple(keep.shape)} for {len(pixels)} pictures"
        # Through an attribute, because timm's forward takes pictures only and wrappers call it as it is.
        slot.keep = keep
        try:
            return self.backbone(self.normalise(pixels))
        finally:
            # After an error too: the next call, perhaps of a validation, must see all patches.
            slot.keep = None

    def check_patch_drop(self) -> KeepPatches:
        """The place where patches are left out.

        Raises:
            InputError: If the model cannot leave any out.
        """
        slot = getattr(self.backbone, "patch_drop", None)
        if not isinstance(slot, KeepPatches):
            raise InputError(
                f"this {type(self.backbone).__name__} cannot leave patches out",
                where=f"encoder {self.architecture}",
                mend="use patch_drop=0 (and no patch_drop_rate in model_args), or a plain ViT",
            )
        return slot

    def tokens(self, pixels: Tensor, layer: int | None = None) -> Tensor:
        """Patch tokens, without class or register tokens.

        Args:
            pixels: uint8[B, 3, H, W], or float[B, 3, H, W] already normalised.
            layer: None for the output of the final norm; a negative number counts blocks from the end, before the
                final norm, as transformers' ``hidden_states`` does: -1 is the last block, -2 the one before.

        Returns:
            float[B, N, D].

        Raises:
            InputError: If the tower has no such block.
        """
        pixels = self.normalise(pixels)
        if layer is None:
            return self._flatten(self.backbone.forward_features(pixels))
        depth = len(self.backbone.feature_info)
        if not -depth <= layer <= -1:
            raise InputError(f"no layer {layer} in a tower of {depth} blocks", mend=f"use -{depth} ... -1, or null")
        # NCHW is the one format every timm model offers, and it drops the prefix tokens; stop_early leaves the
        # later blocks out, as LLaVA does with the last one.
        (grid,) = self.backbone.forward_intermediates(
            pixels, indices=[depth + layer], stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return grid.flatten(2).transpose(1, 2)

    def _flatten(self, features: Tensor) -> Tensor:
        """Bring timm's three output formats (NLC, NHWC, NCHW) to float[B, N, D]."""
        if features.ndim == 3:
            return features[:, self.num_prefix_tokens :]
        if features.shape[-1] == self.width:
            return features.flatten(1, 2)
        return features.flatten(2).transpose(1, 2)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in backward (less memory, about a third more compute)."""
        self.backbone.set_grad_checkpointing(enable)

    def compile_backbone(self, **options: Any) -> None:
        """Compile the tower's forward pass in place with ``torch.compile``; names of weights stay as they are.

        Args:
            options: Of ``torch.compile``, such as ``mode`` or ``dynamic``.
        """
        # nn.Module.compile, not torch.compile(module): the latter wraps, and every saved name would begin with _orig_mod.
        self.backbone.compile(**options)


def build_encoder(
    architecture: str,
    *,
    image_size: int = 224,
    patch_size: int | None = None,
    model_args: dict[str, Any] | None = None,
    pretrained: bool = False,
    layout: Layout = "superclass",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int | None = None,
) -> VisionEncoder:
    """Build a tower by its timm name.

    Args:
        architecture: A name of timm's registry, such as ``vit_base_patch16_224``.
        image_size: Side of the square pictures, in pixels.
        patch_size: Overrides the patch size in the name.
        model_args: Further arguments of the timm model, such as ``{"depth": 4, "embed_dim": 128}``.
        pretrained: Load timm's weights for that name (downloads).
        layout: ``superclass`` gives a plain ViT SigLIP's layout; ``native`` keeps the model as timm defines it. Models
            that are no plain ViT always keep their own.
        mean: Channel means; default OpenAI CLIP's, or with `pretrained` those the weights were trained with.
        std: Channel standard deviations, likewise.
        seed: Seeds the weights without touching the global generator; None uses the global one.

    Returns:
        The encoder, on the CPU, in training mode.

    Raises:
        InputError: If timm does not know the name, or the model does not take these arguments.
    """
    _check_name(architecture)
    superclass = layout == "superclass" and _is_plain_vit(architecture)
    # What a recipe says in model_args has the last word over the layout.
    args = {**(SUPERCLASS_LAYOUT if superclass else {"num_classes": 0}), **(model_args or {})}
    # Convolutional models take any size and refuse the argument; timm marks the others as fixed.
    if superclass or timm.get_pretrained_cfg(architecture).fixed_input_size:
        args["img_size"] = image_size
    if patch_size is not None:
        args["patch_size"] = patch_size
    with _seeded(seed):
        backbone = create_backbone(architecture, args, pretrained=pretrained)
    # A tower with published weights must see the pixels it was trained on.
    trained_with = backbone.pretrained_cfg if pretrained else {}
    return VisionEncoder(
        backbone,
        # Without the tag: it names published weights, and the folder will hold its own.
        architecture=architecture.partition(".")[0],
        model_args=args,
        image_size=image_size,
        mean=mean or trained_with.get("mean", CLIP_MEAN),
        std=std or trained_with.get("std", CLIP_STD),
    )


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8[B, 3, H, W] to float32 of mean 0 and deviation 1, by statistics [1, 3, 1, 1] of pixels in 0 to 1."""
    return (pixels.float() / 255.0 - mean) / std


def at_size(encoder: VisionEncoder, image_size: int) -> VisionEncoder:
    """The encoder for pictures of another size, its positions interpolated in place by timm (bicubic, antialiased).

    Args:
        encoder: Any encoder; it is used up: its module goes into the result.
        image_size: Side of the square pictures, in pixels.

    Returns:
        The encoder itself where the size is its own, else a new one around the same module.

    Raises:
        InputError: No whole number of patches, or a tower made for one size.
    """
    if image_size == encoder.image_size:
        return encoder
    where, args = f"encoder {encoder.architecture}", dict(encoder.model_args)
    tower = encoder.backbone
    if hasattr(tower, "set_input_size"):
        patch = tower.patch_embed.patch_size[0]
        if image_size % patch:
            # timm would leave out the rest at the right and below, in silence.
            raise InputError(
                f"{image_size} pixels are no whole number of patches of {patch}", where=where, mend="change image_size"
            )
        tower.set_input_size(img_size=(image_size, image_size))
        args["img_size"] = image_size
    elif tower.pretrained_cfg.get("fixed_input_size"):
        raise InputError(
            f"a {type(tower).__name__} for {encoder.image_size}-pixel pictures cannot be resized",
            where=where,
            mend=f"use image_size: {encoder.image_size}",
        )
    return VisionEncoder(
        tower, architecture=encoder.architecture, model_args=args, image_size=image_size, mean=encoder.mean, std=encoder.std
    ).train(encoder.training)


def create_backbone(architecture: str, args: dict[str, Any], *, pretrained: bool = False) -> Any:
    """Call timm, and turn its complaints about name and arguments into one line for the user."""
    _check_name(architecture)
    where = f"encoder {architecture}"
    try:
        # What JSON cannot hold could not be written to config.json after days of training: refuse it now.
        json.dumps(args)
        return timm.create_model(architecture, pretrained=pretrained, **args)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(
            f"arguments {args} do not fit: {str(error).splitlines()[0] if str(error) else 'refused by timm'}",
            where=where,
            mend="correct image_size, patch_size or model_args",
        ) from error
    except RuntimeError as error:
        # Without weights to load a RuntimeError is no matter of the user's arguments, so it stays a traceback.
        if not pretrained:
            raise
        raise InputError("the published weights do not fit this layout", where=where, mend="use layout: native") from error


def _check_name(architecture: str) -> None:
    """Refuse a name that timm does not have, with the nearest ones it has."""
    # timm writes the training recipe of published weights behind a dot: vit_base_patch16_224.augreg_in21k.
    name = architecture.partition(".")[0]
    if "/" in name or ":" in name or not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        mend = f"nearest: {', '.join(near)}" if near else "see timm.list_models()"
        raise InputError(f"timm has no model {architecture!r}", mend=mend)


def _is_plain_vit(architecture: str) -> bool:
    """Whether timm builds this name with its `VisionTransformer`, whose tokens and pooling can be chosen."""
    # By the module and not by the class: other families build the same class with parts of their own.
    return timm.model_entrypoint(architecture.partition(".")[0]).__module__ == "timm.models.vision_transformer"


def _can_keep_patches(backbone: Any) -> bool:
    """Whether a model runs timm's plain ViT forward, where patches can leave before the blocks, and drops none by itself."""
    # A subclass with its own forward would leave the module out or put it elsewhere.
    plain = isinstance(backbone, VisionTransformer) and type(backbone).forward_features is VisionTransformer.forward_features
    return plain and isinstance(backbone.patch_drop, nn.Identity)


def _num_tokens(backbone: Any, image_size: int) -> int:
    """Patch tokens per picture, from the stride of the last stage."""
    # Not patch_embed.num_patches alone: in a Swin it counts the first stage, sixty-four times the tokens that come out.
    stride = int(backbone.feature_info[-1]["reduction"])
    embed = getattr(backbone, "patch_embed", None)
    patches = getattr(embed, "num_patches", None)
    if patches is not None and getattr(embed, "patch_size", None) in (stride, (stride, stride)):
        return int(patches)
    return (image_size // stride) ** 2


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Run with a seeded CPU generator and restore the old state; without a seed do nothing."""
    if seed is None:
        yield
        return
    # No devices: the weights are made on the CPU, and touching CUDA here would start it in data workers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
