"""Which projector fits which model: by fingerprint, because matching shapes prove nothing (facts/llava.md 1.11)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from mmkit.errors import InputError
from mmkit.models.meta import read_meta
from mmkit.models.projectors import VisionLanguageModel

_PART = "multi_modal_projector."
# What a projector was trained between, besides the two models themselves.
_SETTINGS = ("feature_layer", "image_size", "projector", "pixel_shuffle")


def tuned_parts(model: VisionLanguageModel, meta: dict[str, Any]) -> list[str]:
    """Which parts are no longer what their fingerprint says, once this model is trained: "encoder", "llm".

    Args:
        model: With ``requires_grad`` as it will train.
        meta: Of the model that training goes on from.
    """
    parts = {"encoder": (model.model.vision_tower,), "llm": (model.model.language_model, model.lm_head)}
    # Asked of the weights and not of the recipe's mode: adapters, too, change what the projector speaks to.
    now = {name for name, modules in parts.items() if any(p.requires_grad for m in modules for p in m.parameters())}
    return sorted(now | set(meta.get("tuned", ())))


def check_origin(meta: dict[str, Any], theirs: dict[str, Any], source: str | Path) -> None:
    """Refuse a projector that was trained with another encoder, LLM, layer, picture size or shape.

    Args:
        meta: mmkit.json's content of the model that is to get it.
        theirs: mmkit.json's content of the model that it comes from.
        source: Where that model is, for the message.

    Raises:
        InputError: With what differs, both sides named.
    """
    for part in ("encoder", "llm"):
        here, there = meta[part], theirs.get(part) or {}
        if "fingerprint" not in there:
            raise InputError(f"its mmkit.json records no fingerprint of its {part}", where=source, mend="train that run again")
        if here["fingerprint"] != there["fingerprint"]:
            raise InputError(
                f"its projector was trained with {part} {_name(there)}, this model has {_name(here)}",
                where=source,
                mend=f"leave projector_from out, or use that {part}",
            )
        if part in theirs.get("tuned", ()):
            raise InputError(
                f"its {part} was tuned together with the projector, this model has it as it was before",
                where=source,
                mend="go on from that run with model=RUN, or take the projector of its alignment",
            )
    for key in _SETTINGS:
        if meta[key] != theirs.get(key):
            raise InputError(
                f"its projector was trained with {key} {theirs.get(key)}, this model has {meta[key]}",
                where=source,
                mend=f"use {key}={theirs.get(key)}, or leave projector_from out",
            )


def take_projector(model: VisionLanguageModel, meta: dict[str, Any], folder: Path, source: str) -> None:
    """Copy the projector of another model folder into a model, after a look at where both come from.

    Args:
        model: The model to change.
        meta: What its mmkit.json will say.
        folder: The other model's folder.
        source: What the user called it.

    Raises:
        InputError: Another origin, no MLLM, or weights without a projector.
    """
    check_origin(meta, read_meta(folder, "mllm"), source)
    projector = model.model.multi_modal_projector
    projector.load_state_dict(_projector_weights(folder))


def _projector_weights(folder: Path) -> dict[str, Tensor]:
    """The projector's weights out of a folder; nothing else of it is read."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (no mapping: it has keys() and no iterator)
                # With or without "model." in front, by release of transformers.
                _, part, rest = name.partition(_PART)
                if part:
                    found[rest] = weights.get_tensor(name)
    if not found:
        raise InputError("no projector in its weights", where=folder, mend="give a run of stage llava")
    return found


def _name(part: dict[str, Any]) -> str:
    """A part for a message: what the recipe called it, and the beginning of its fingerprint."""
    fingerprint = str(part["fingerprint"])
    name = part.get("path") or part.get("name") or "with random weights"
    return name if name == fingerprint else f"{name} ({fingerprint[:8]})"
