"""Starting a new tower, and its label head, from weights that exist: of a run, timm, the hub, transformers or open_clip."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from mmkit.encoders.head import SuperClassHead
from mmkit.encoders.idf import load_table
from mmkit.encoders.labels import CaptionLabels
from mmkit.encoders.save import encoder_folder, load_encoder, load_weights
from mmkit.encoders.siglip import activation_name
from mmkit.encoders.vit import VisionEncoder
from mmkit.errors import InputError
from mmkit.files import read_json

log = logging.getLogger(__name__)

# Sources that are names and no folders; none of them has a label head of mmkit's.
_LIBRARIES = ("timm:", "hf-hub:", "hf:", "open_clip:")


def init_encoder(encoder: VisionEncoder, source: str, *, statistics: bool = False) -> None:
    """Give a tower the weights of another one.

    Where the pictures or patches differ in size, position embeddings are interpolated and patch embeddings resampled as
    timm does it (bicubic, antialiased); where they are equal, weights are bit for bit the same.

    Args:
        encoder: Changed in place; it keeps its dtype, picture size and pixel statistics.
        source: Run or encoder folder, ``timm:NAME``, ``hf-hub:OWNER/NAME``, ``hf:NAME_OR_FOLDER`` or
            ``open_clip:MODEL:TAG_OR_FILE``.
        statistics: Take over the pixel means and deviations that the weights were trained with, too.

    Raises:
        InputError: No weights there, or they do not fit; names the first tensor or setting that differs.
    """
    # Every source becomes a timm tower first, so that one comparison and one resampling serve them all.
    other = load_encoder(source)
    _check_kind(encoder, other, source)
    # Before shapes are compared: position tables and patch kernels may differ until here.
    _resize(other, encoder, source)
    # All is compared before anything is copied: a refused tower stays as it was.
    state = _placed(encoder, other, source)
    # Copied into place, so that dtype and device stay those of the tower.
    encoder.backbone.load_state_dict(state)
    if (encoder.mean, encoder.std) == (other.mean, other.std):
        return
    # Only where the recipe leaves them open: what it names is the experiment.
    if statistics:
        encoder.set_statistics(other.mean, other.std)
    else:
        log.warning(
            "%s was trained with mean %s, std %s; this tower keeps %s, %s",
            source,
            other.mean,
            other.std,
            encoder.mean,
            encoder.std,
        )


def load_head(source: str, labels: CaptionLabels) -> tuple[SuperClassHead, tuple[Tensor, int] | None]:
    """The label head of a SuperClass run, for going on with the same vocabulary.

    Args:
        source: Run or encoder folder.
        labels: The vocabulary to go on with.

    Returns:
        The head, and the document counts (int64[V], number of captions) if the run kept any.

    Raises:
        InputError: No head there, or one for another vocabulary.
    """
    mend = "use encoder.init_head=false"
    # Told as what it is; below, such a name would be looked for as a folder.
    if source.startswith(_LIBRARIES):
        raise InputError("such weights have no label head", where=source, mend=mend)
    folder = encoder_folder(source)
    note = read_json(folder / "mmkit.json") if (folder / "mmkit.json").is_file() else {}
    theirs = note.get("labels")
    if theirs is None or not (folder / "head.safetensors").is_file():
        raise InputError("no label head here", where=folder, mend=f"{mend}, or start from a SuperClass run")
    ours = labels.describe()
    # Another vocabulary of the same size would fit without a sound and mean other words.
    if theirs["sha256"] != ours["sha256"]:
        names = [f"{d['name']} ({d['vocab_size']} labels, sha256 {d['sha256'][:8]})" for d in (theirs, ours)]
        what = f"its head is for the vocabulary {names[0]}, this recipe has {names[1]}"
        raise InputError(what, where=folder, mend=f"use the same data.labels, or {mend.removeprefix('use ')}")
    head = SuperClassHead(int(read_json(folder / "config.json")["num_features"]), labels.vocab_size)
    load_weights(head, folder / "head.safetensors")
    table = folder / "idf.safetensors"
    if not table.is_file():
        return head, None
    return head, load_table(table, **labels.for_table())


def _check_kind(encoder: VisionEncoder, other: VisionEncoder, source: str) -> None:
    """Refuse what the shapes of weights do not show: another class, other heads, another activation."""
    mine, theirs = encoder.backbone, other.backbone
    # A ViT's weights would fit some of its relatives by name and shape, and mean something else there.
    if type(mine).__name__ != type(theirs).__name__:
        what = f"its tower is a {type(theirs).__name__}, this one a {type(mine).__name__}"
        raise InputError(what, where=source, mend=f"use encoder.architecture={other.architecture}")
    # Of one class by now, so both have the same keys.
    before, after = _settings(theirs), _settings(mine)
    for name, value in before.items():
        if value != after[name]:
            key = f"encoder.model_args.{name}={value}"
            raise InputError(f"its {name} is {value}, this tower's {after[name]}", where=source, mend=f"use {key}")
    # 1e-5 for 1e-6 moves features by a few millionths, and no argument of timm could set it: worth a line, no refusal.
    old, new = _epsilon(theirs), _epsilon(mine)
    if old != new:
        log.info("%s: its norms have epsilon %g, this tower's %g", source, old, new)


def _settings(tower: Any) -> dict[str, Any]:
    """Settings of a plain ViT that change the numbers and no shape."""
    # Other families have no such settings: there the shapes alone decide.
    if not hasattr(tower, "blocks") or not hasattr(tower.blocks[0], "mlp"):
        return {}
    block = tower.blocks[0]
    return {
        # Any number of heads has the same weights: a wrong one loads without complaint.
        "num_heads": getattr(block.attn, "num_heads", None),
        "act_layer": activation_name(block.mlp.act, "timm") if hasattr(block.mlp, "act") else None,
    }


def _epsilon(tower: Any) -> float | None:
    """Epsilon of the first norm in the blocks of a ViT."""
    return getattr(tower.blocks[0].norm1, "eps", None) if _settings(tower) else None


def _resize(other: VisionEncoder, encoder: VisionEncoder, source: str) -> None:
    """Bring the source to the pictures and patches of the tower, by timm's own resampling."""
    old, new = (getattr(e.backbone, "patch_embed", None) for e in (other, encoder))
    # Without a grid nothing depends on the size: convolutions take pictures of any.
    if old is None or new is None or not hasattr(old, "grid_size") or not hasattr(new, "grid_size"):
        return
    # Grids and patches, not pictures: 32 pixels in patches of 8 have the positions of 64 in patches of 16.
    before, after = (tuple(old.grid_size), tuple(old.patch_size)), (tuple(new.grid_size), tuple(new.patch_size))
    if before == after:
        return
    if not hasattr(other.backbone, "set_input_size"):
        raise InputError(
            f"a {type(other.backbone).__name__} for {other.image_size}-pixel pictures cannot be resized",
            where=source,
            mend=f"use encoder.image_size={other.image_size}",
        )
    # The source is changed and not the tower: it was opened for this alone and is thrown away after.
    other.backbone.set_input_size(img_size=tuple(new.img_size), patch_size=tuple(new.patch_size))
    log.info(
        "%s: positions %dx%d -> %dx%d, patches %d -> %d pixels (bicubic, antialiased)",
        source,
        *before[0],
        *after[0],
        before[1][0],
        after[1][0],
    )


def _placed(encoder: VisionEncoder, other: VisionEncoder, source: str) -> dict[str, Tensor]:
    """The source's weights for the tower, after a look at every name and shape."""
    wanted, state = encoder.backbone.state_dict(), dict(other.backbone.state_dict())
    # SigLIP's pooling and classifiers come after the tokens: without them the blocks compute what they did.
    after_tokens = [name for name in state if name not in wanted and name.startswith(("attn_pool.", "head."))]
    for name in after_tokens:
        del state[name]
    if after_tokens:
        log.info("%s: %d weights of its pooling are left out, this tower has none", source, len(after_tokens))
    unplaced = [name for name in state if name not in wanted]
    if unplaced:
        native = f"use encoder.layout=native with encoder.architecture={other.architecture}"
        token = " (a class token and what belongs to it)" if "cls_token" in unplaced else ""
        raise InputError(f"{unplaced[0]} has no place in this tower{token}", where=source, mend=native)
    for name, value in wanted.items():
        if name not in state:
            mend = (
                "use encoder.layout=superclass"
                if name in ("cls_token", "reg_token")
                else f"use encoder.architecture={other.architecture}"
            )
            raise InputError(f"{name} of this tower is not in the weights", where=source, mend=mend)
        if state[name].shape != value.shape:
            what = f"{name} is {list(state[name].shape)} in the weights, {list(value.shape)} in this tower"
            raise InputError(what, where=source, mend=f"use the sizes of {other.architecture} in the recipe")
    return state
