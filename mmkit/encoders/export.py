"""Encoders in the formats of other libraries: timm, transformers' SigLIP and open_clip, each reopened and compared."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmkit.encoders.save import encoder_folder, load_encoder, save_encoder, timm_config
from mmkit.encoders.siglip import to_siglip
from mmkit.encoders.vit import VisionEncoder
from mmkit.errors import InputError
from mmkit.files import new_folder, write_json

if TYPE_CHECKING:
    from mmkit.encoders.text import TextTower

log = logging.getLogger(__name__)

FORMATS = ("timm", "siglip", "open_clip")
# Captions that a tokenizer must read alike: case, punctuation, digits, entities, accents, and one that is cut.
_CAPTIONS = ["A photo of 2 dogs.", "caf\u00e9 &amp; th\u00e9,  it's", "", "a very long caption " * 40]


def export_model(source: str, out: Path, *, format: str) -> Path:
    """Write an encoder in another library's format; the folder appears only after that library gave the same features.

    Args:
        source: Anything `load_encoder` opens; for ``open_clip`` a clip or lit run.
        out: A folder that does not exist, or is empty.
        format: ``timm``, ``siglip`` or ``open_clip``.

    Returns:
        The folder.

    Raises:
        InputError: Unknown format, a folder in the way, or an encoder that the format cannot hold.
    """
    if format not in FORMATS:
        raise InputError(
            f"unknown format {format!r}", where="--format", mend=f"use one of {', '.join(FORMATS)}, or llava for an MLLM"
        )
    out = Path(out)
    # Before the weights are read, because that can take minutes.
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("is in the way", where=out, mend="name a folder that does not exist")
    encoder = load_encoder(source)
    if format == "open_clip":
        _export_open_clip(encoder, _text_tower(source), out)
    else:
        write = _write_timm if format == "timm" else _write_siglip
        with new_folder(out) as folder:
            write(encoder, folder)
    log.info("%s: written for %s and checked", out, format)
    return out


def _write_timm(encoder: VisionEncoder, folder: Path) -> None:
    """The encoder folder, which ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens."""
    save_encoder(encoder, folder)
    # As a stranger opens it, without mmkit.
    reopened = timm.create_model(f"local-dir:{folder}", pretrained=True).to(_dtype(encoder)).eval()
    # Exactly: the same library with the same weights can only differ by a lost argument.
    _compare(lambda x: reopened(x), encoder.backbone, encoder, exact=True)


def _write_siglip(encoder: VisionEncoder, folder: Path) -> None:
    """A folder that ``SiglipVisionModel.from_pretrained`` and ``AutoImageProcessor.from_pretrained`` open."""
    from transformers import SiglipImageProcessor, SiglipVisionModel

    # Raises before anything is written if the tower has another layout.
    to_siglip(encoder).save_pretrained(folder)
    size = {"height": encoder.image_size, "width": encoder.image_size}
    # 3 is bicubic, as in training; the whole picture is squeezed to the square, as in mmkit's validation.
    processor = SiglipImageProcessor(size=size, resample=3, image_mean=list(encoder.mean), image_std=list(encoder.std))
    processor.save_pretrained(folder)
    reopened = SiglipVisionModel.from_pretrained(folder, dtype="auto").eval()
    _compare(lambda x: reopened(pixel_values=x).last_hidden_state, encoder.tokens, encoder)


def _text_tower(source: str) -> TextTower:
    """The text tower beside an encoder.

    Raises:
        InputError: There is none, as after SuperClass.
    """
    from mmkit.encoders.text import load_text

    try:
        return load_text(encoder_folder(source))
    except InputError as error:
        what = f"open_clip wants a text tower too: {error.what}"
        # open_clip has no model with an image tower alone.
        raise InputError(what, where=source, mend="train one with stage=lit, or use --format timm") from error


def _export_open_clip(encoder: VisionEncoder, text: TextTower, out: Path) -> None:
    """A folder that ``open_clip.create_model_and_transforms("local-dir:FOLDER")`` opens.

    Its image tower is the timm model. open_clip builds that from a name of timm's registry alone, without picture size or
    other arguments; a tower that has no such name is built from the folder ``timm_model`` inside, by its full path.
    """
    # open_clip builds in float32; halves become floats without loss, and then both sides compute alike.
    encoder, text = encoder.float(), text.float()
    name = registry_name(encoder)
    with new_folder(out) as folder:
        _write_open_clip_weights(encoder, text, folder / "open_clip_model.safetensors")
        if name is None:
            write_json(folder / "timm_model" / "config.json", timm_config(encoder))
        config = open_clip_config(encoder, text, name or f"local-dir:{folder / 'timm_model'}")
        write_json(folder / "open_clip_config.json", config)
        _check_open_clip(encoder, text, folder)
        if name is None:
            # Checked under the temporary name; from now on it is the final one.
            config["model_cfg"]["vision_cfg"]["timm_model_name"] = f"local-dir:{out.resolve() / 'timm_model'}"
            write_json(folder / "open_clip_config.json", config)
    if name is None:
        log.warning(
            "%s: timm has no name for this tower, so timm_model_name in open_clip_config.json is a path; change it "
            "there when the folder moves",
            out,
        )


def registry_name(encoder: VisionEncoder) -> str | None:
    """The name from which timm alone, without arguments, builds this tower; None if there is none.

    Towers in the superclass layout are timm's ``vit_*_siglip_gap_*``, as far as it has the size.
    """
    # A name survives a move of the folder, a path does not; so the registry is searched first.
    wanted = _signature(encoder.backbone)
    # The tower's own name first: where it is right, one model is built instead of many.
    for name in (encoder.architecture, *timm.list_models("vit_*_siglip_gap_*")):
        cfg = timm.get_pretrained_cfg(name)
        # Convolutions take pictures of any size; all others are built for the size in their name.
        if cfg.fixed_input_size and cfg.input_size[-1] != encoder.image_size:
            continue
        # Shapes are enough, and the largest candidate has a billion weights.
        with torch.device("meta"):
            model = timm.create_model(name)
        # Names come with a classifier of 1,000 classes, which an exported tower has not.
        model.reset_classifier(0)
        if _signature(model) == wanted:
            return str(name)
    return None


def _signature(model: Any) -> tuple[Any, ...]:
    """What tells two timm models apart: names and shapes of weights, and the settings that no shape shows."""
    shapes = tuple((name, tuple(value.shape)) for name, value in model.state_dict().items())
    settings = tuple(repr(getattr(model, name, None)) for name in ("global_pool", "num_prefix_tokens"))
    inside = tuple(
        (
            name,
            getattr(part, "eps", None),
            getattr(part, "num_heads", None),
            getattr(part, "approximate", None),
            type(part).__name__,
        )
        for name, part in model.named_modules()
        if not any(part.children()) or hasattr(part, "num_heads")
        # The place where mmkit puts its own module without weights.
        if name != "patch_drop"
    )
    return type(model).__name__, shapes, settings, inside


def open_clip_config(encoder: VisionEncoder, text: TextTower, timm_name: str) -> dict[str, Any]:
    """What open_clip reads: sizes of both towers, and the preprocessing.

    Args:
        encoder: The image tower.
        text: The text tower.
        timm_name: Of the image tower, for ``timm.create_model``.

    Returns:
        The content of ``open_clip_config.json``.
    """
    tower = text.text
    block = tower.transformer.resblocks[0]
    model: dict[str, Any] = {
        "embed_dim": text.image_projection.out_features,
        "vision_cfg": {
            "image_size": encoder.image_size,
            "timm_model_name": timm_name,
            # The weights come from the folder; True would download others first.
            "timm_model_pretrained": False,
            # Empty leaves the timm model's own pooling.
            "timm_pool": "",
            "timm_proj": "linear",
        },
        "text_cfg": {
            "context_length": tower.context_length,
            "vocab_size": tower.vocab_size,
            "width": tower.width,
            "heads": tower.heads,
            "layers": tower.transformer.layers,
            "mlp_ratio": block.mlp.c_fc.out_features / tower.width,
        },
        # Keeps the text tower in one piece, so that its names are those of mmkit's.
        "custom_text": True,
    }
    if text.logit_bias is not None:
        # Only makes the parameter exist; its value comes with the weights.
        model["init_logit_bias"] = 0.0
    preprocess = {"mean": list(encoder.mean), "std": list(encoder.std), "interpolation": "bicubic", "resize_mode": "squash"}
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def _write_open_clip_weights(encoder: VisionEncoder, text: TextTower, file: Path) -> None:
    """Both towers under open_clip's names."""
    state = {f"visual.trunk.{name}": value for name, value in encoder.backbone.state_dict().items()}
    # open_clip's timm tower puts the projection into its head; timm_proj "linear" in the config has no bias.
    state["visual.head.proj.weight"] = text.image_projection.weight
    state |= {f"text.{name}": value for name, value in text.text.state_dict().items()}
    # open_clip keeps these as scalars.
    state |= {name: value.reshape(()) for name, value in text.named_parameters() if name in ("logit_scale", "logit_bias")}
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, file, metadata={"format": "pt"})


def _check_open_clip(encoder: VisionEncoder, text: TextTower, folder: Path) -> None:
    """Open the folder as a user of open_clip would, and compare pictures, tokens and texts."""
    import open_clip

    # The random weights are thrown away; they must not move the caller's generator.
    with torch.random.fork_rng(devices=[]):
        model = open_clip.create_model(f"local-dir:{folder}").eval()
    _compare(lambda x: model.encode_image(x, normalize=True), lambda x: text.encode_image(encoder(x)), encoder)
    # Equal towers with another tokenizer would still give other text embeddings.
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(_CAPTIONS)
    assert torch.equal(tokens, text.tokenize(_CAPTIONS)), "open_clip's tokenizer reads captions otherwise"
    with torch.inference_mode():
        torch.testing.assert_close(model.encode_text(tokens, normalize=True), text.encode_text(tokens), rtol=0, atol=1e-5)


def _compare(
    theirs: Callable[[Tensor], Tensor], ours: Callable[[Tensor], Tensor], encoder: VisionEncoder, *, exact: bool = False
) -> None:
    """Both on two random pictures: equal, or but for the order of additions unless they have to be exact."""
    # Noise lights up every weight; a plain picture could hide a swapped channel.
    generator = torch.Generator().manual_seed(0)
    size = encoder.image_size
    pixels = encoder.normalise(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator))
    with torch.inference_mode():
        after, before = theirs(pixels), ours(pixels)
    if torch.equal(after, before):
        log.info("features are bit for bit the same")
        return
    assert not exact, f"the reopened tower differs by {float((after - before).abs().max()):.1g}"
    # Half a last place of each of the many sums; bf16 keeps 8 bits.
    tolerance = 1e-5 if before.dtype == torch.float32 else 2e-2
    scale = max(1.0, float(before.abs().max()))
    torch.testing.assert_close(after, before, rtol=0, atol=tolerance * scale)
    log.info("features differ by at most %.1g", float((after - before).abs().max()))


def _dtype(encoder: VisionEncoder) -> torch.dtype:
    """The dtype of the tower's weights."""
    return next(encoder.backbone.parameters()).dtype
