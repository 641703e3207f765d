"""Encoder folders: a timm local-dir that needs no mmkit to open, with the tagging head and labels beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import load_model_config_from_hf

from mmkit.encoders.head import SuperClassHead
from mmkit.encoders.labels import CaptionLabels
from mmkit.encoders.vit import CLIP_MEAN, CLIP_STD, VisionEncoder, build_encoder, create_backbone
from mmkit.errors import InputError
from mmkit.files import new_folder

# The rest of timm's own config speaks of weights (urls, tags, label names) that are not these.
_KEPT_CFG = ("interpolation", "crop_pct", "first_conv", "classifier", "pool_size", "fixed_input_size", "license")


def save_encoder(
    encoder: VisionEncoder,
    folder: str | Path,
    *,
    head: SuperClassHead | None = None,
    labels: CaptionLabels | None = None,
    extra: dict[str, Any] | None = None,
    write_more: Callable[[Path], None] | None = None,
) -> Path:
    """Write a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens without mmkit.

    The folder appears at once and whole: it is written beside its place and then renamed. An older one is replaced.

    Args:
        encoder: The tower.
        folder: Where to.
        head: The tagging head, written as ``head.safetensors``.
        labels: The head's vocabulary; a vocabulary file of the user's is copied into the folder.
        extra: Further JSON to keep in ``mmkit.json``.
        write_more: Writes further files (a text tower, document counts) into the folder before it appears.

    Returns:
        The folder.
    """
    folder = Path(folder)
    note: dict[str, Any] = {"kind": "encoder"}
    with new_folder(folder) as temporary:
        _write_json(temporary / "config.json", timm_config(encoder))
        _write_weights(temporary / "model.safetensors", encoder.backbone)
        if head is not None:
            _write_weights(temporary / "head.safetensors", head)
        if labels is not None:
            note["labels"] = labels.describe()
            if labels.name != "clip":
                note["labels"]["file"] = "labels.model" if labels.file.suffix == ".model" else "labels.json"
                # The user's file may be gone or changed when the model is opened.
                shutil.copyfile(labels.file, temporary / note["labels"]["file"])
        if extra is not None:
            note["extra"] = extra
        # A file of its own, so that config.json holds what timm knows and nothing else.
        _write_json(temporary / "mmkit.json", note)
        if write_more is not None:
            write_more(temporary)
    return folder


def timm_config(encoder: VisionEncoder) -> dict[str, Any]:
    """The ``config.json`` from which timm builds the tower again, preprocessing included."""
    native = encoder.backbone.pretrained_cfg
    cfg = {key: native[key] for key in _KEPT_CFG if native.get(key) is not None}
    if not encoder.num_prefix_tokens and encoder.model_args.get("class_token") is False:
        # Trained by mmkit: the whole short side is shown, as in open_clip's inference transform.
        cfg |= {"crop_pct": 1.0, "interpolation": "bicubic"}
    size = encoder.image_size
    cfg |= {
        "input_size": [3, size, size],
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "num_classes": 0,
        # Names such as vit_base_patch16_224 carry a loader for .npz files; these are plain state dicts.
        "custom_load": False,
    }
    return {
        "architecture": encoder.architecture,
        "num_classes": 0,
        "num_features": encoder.width,
        "model_args": encoder.model_args,
        "pretrained_cfg": cfg,
    }


def load_encoder(path: str | Path) -> VisionEncoder:
    """Open an encoder for inference.

    Args:
        path: An encoder folder, a run directory (its ``model`` is taken), ``timm:NAME``, ``hf-hub:OWNER/NAME`` (timm on
            the hub), ``hf:NAME_OR_FOLDER`` (transformers) or ``open_clip:MODEL:TAG_OR_FILE``; names download weights
            unless they are cached.

    Returns:
        The encoder on the CPU, in eval mode.

    Raises:
        InputError: If there is no encoder there, or it is damaged.
    """
    name = str(path)
    if name.startswith("timm:"):
        architecture = name.removeprefix("timm:")
        size = _published_size(architecture)
        return build_encoder(architecture, pretrained=True, layout="native", image_size=size).eval()
    if name.startswith("hf-hub:"):
        return _from_hub(name).eval()
    if name.startswith(("hf:", "open_clip:")):
        # Imported here: transformers and open_clip are slow to import, and mmkit's own folders need neither.
        from mmkit.encoders import foreign

        library, _, rest = name.partition(":")
        return (foreign.load_huggingface(rest) if library == "hf" else foreign.load_open_clip(rest)).eval()
    folder = encoder_folder(path)
    config = _read_json(folder / "config.json")
    cfg = config.get("pretrained_cfg", {})
    size = int(cfg.get("input_size", [3, 224, 224])[-1])
    args = {"num_classes": 0, **config.get("model_args", {})}
    with torch.random.fork_rng(devices=[]):
        # The random weights are thrown away below; they must not move the caller's generator either.
        backbone = create_backbone(config["architecture"], args)
    encoder = VisionEncoder(
        backbone,
        architecture=config["architecture"],
        model_args=args,
        image_size=size,
        mean=cfg.get("mean", CLIP_MEAN),
        std=cfg.get("std", CLIP_STD),
    )
    load_weights(encoder.backbone, folder / "model.safetensors")
    return encoder.eval()


def load_tagger(path: str | Path) -> tuple[VisionEncoder, SuperClassHead, CaptionLabels]:
    """Open an encoder with its head and vocabulary, for predicting tags.

    Args:
        path: An encoder folder or a run directory.

    Returns:
        Encoder, head and labels, in eval mode.

    Raises:
        InputError: If the folder has no head or no labels.
    """
    folder = encoder_folder(path)
    encoder = load_encoder(folder)
    described = _read_json(folder / "mmkit.json").get("labels") if (folder / "mmkit.json").is_file() else None
    if described is None or not (folder / "head.safetensors").is_file():
        raise InputError("this encoder has no tagging head", where=folder, mend="use one that mmkit trained")
    name = str(folder / described["file"]) if "file" in described else described["name"]
    labels = CaptionLabels(name, context_length=described.get("context_length"), stop_words=described.get("stop_words"))
    # Another vocabulary of the same size would give wrong words without any error.
    if labels.describe()["sha256"] != described["sha256"]:
        raise InputError(f"the vocabulary {name} is not the one of training", where=folder, mend="restore the file")
    head = SuperClassHead(encoder.width, labels.vocab_size)
    load_weights(head, folder / "head.safetensors")
    return encoder, head.eval(), labels


def encoder_folder(path: str | Path) -> Path:
    """The encoder folder a path means: itself, or ``model`` in a run directory."""
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            # A language model's folder holds files of the same names.
            if "architecture" in _read_json(folder / "config.json"):
                return folder
            raise InputError("a model, but no timm encoder", where=folder, mend="give the encoder's folder or run")
    what = "no encoder here (config.json and model.safetensors)" if path.exists() else "no such folder"
    mend = "give an encoder folder, a finished run, timm:NAME, hf-hub:OWNER/NAME, hf:NAME or open_clip:MODEL:TAG"
    raise InputError(what, where=path, mend=mend)


def _published_size(architecture: str) -> int:
    """The picture size timm's weights of that name were made for."""
    cfg = timm.get_pretrained_cfg(architecture, allow_unregistered=True) if timm.is_model(architecture) else None
    return int(cfg.input_size[-1]) if cfg is not None else 224


def _from_hub(name: str) -> VisionEncoder:
    """A timm model of the Hugging Face hub."""
    try:
        cfg, architecture, args = load_model_config_from_hf(name.removeprefix("hf-hub:"))
        backbone = timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"cannot be fetched: {error}", where=name, mend="check the name and the network") from error
    return VisionEncoder(
        backbone,
        architecture=architecture,
        model_args={**(args or {}), "num_classes": 0},
        image_size=int(cfg["input_size"][-1]),
        mean=cfg["mean"],
        std=cfg["std"],
    )


def load_weights(module: torch.nn.Module, file: Path) -> None:
    """Load weights strictly; the module takes the dtype they were saved in."""
    try:
        state = load_file(file)
        # Batch norms count their steps in int64, so not every tensor tells the dtype.
        dtype = next(value.dtype for value in state.values() if value.is_floating_point())
        module.to(dtype).load_state_dict(state)
    except (SafetensorError, RuntimeError, OSError) as error:
        # torch lists every tensor that does not fit, hundreds of lines where another architecture was named.
        first = str(error).splitlines()[0]
        raise InputError(f"weights cannot be read: {first}", where=file, mend="write the folder again") from error


def _write_weights(file: Path, module: torch.nn.Module) -> None:
    """Write a state dict as contiguous CPU tensors."""
    # safetensors refuses tensors that are views with gaps.
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    save_file(state, file, metadata={"format": "pt"})


def _write_json(file: Path, value: dict[str, Any]) -> None:
    """Write JSON for people and machines."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object, or say which file is damaged."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"not readable JSON ({error})", where=file, mend="write the folder again") from error
    assert isinstance(value, dict), f"{file} must hold a JSON object"
    return value
