"""An MLLM run as a folder for other people's software, reopened as a stranger would and compared before it appears."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmkit.errors import InputError
from mmkit.files import new_folder
from mmkit.models.llava import load_mllm, save_mllm
from mmkit.models.projectors import linear_as_relu, projector_kind
from mmkit.run import resolve_parent

log = logging.getLogger(__name__)

# Sums in another order move the last bits: of 24 in fp32, of 8 in bf16. What is really different moves more.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
_QUESTION = "Describe the picture."
_REPORT = "keep the run, and report this with the versions in its manifest.json"


def export_llava(source: str, out: Path) -> Path:
    """Write a run's model for transformers, vLLM and lmms-eval; the folder appears only after its logits were found equal.

    It holds weights, config, processor, tokenizer, chat template and generation settings, and nothing of mmkit's. A ``linear``
    projector is rewritten with an activation that vLLM knows, where the tower's tokens are narrow enough for that.

    Args:
        source: A run of stage llava, or its model folder.
        out: A folder that does not exist, or is empty.

    Returns:
        The folder.

    Raises:
        InputError: No MLLM, a folder in the way, or logits that differ after reopening.
    """
    out = Path(out)
    # Before the weights are read, because that can take minutes.
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("is in the way", where=out, mend="name a folder that does not exist")
    parent = resolve_parent("model", source)
    model, processor, _ = load_mllm(parent.folder or Path(source))
    inputs = _inputs(processor, model.dtype)
    before = _logits(model, inputs)
    kind = projector_kind(model.config)["projector"]
    if linear_as_relu(model):
        log.info("%s: the linear projector is written with relu, which vLLM knows; it computes the same map", out)
    elif kind == "linear":
        log.warning(
            "%s: vLLM has no linear projector, and this tower is too wide to write it with relu; transformers opens it", out
        )
    if model.config.model_type != "llava" or model.config.vision_config.model_type not in (
        "clip_vision_model",
        "siglip_vision_model",
    ):
        names = f"{model.config.model_type} with a {model.config.vision_config.model_type} tower"
        log.warning("%s: opens in transformers; vLLM's LLaVA takes SigLIP's and CLIP's layouts only, not %s", out, names)
    with new_folder(out) as folder:
        save_mllm(model, processor, folder, meta=None)
        # Two of them at once would be 54 GB at 7B in fp32.
        del model
        _check(folder, inputs, before)
    log.info("%s: written and checked", out)
    return out


def _inputs(processor: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """A picture and a question, as a user of transformers prepares them."""
    # Noise of an odd size: it lights up every weight and goes through resizing, where a plain picture could hide a swapped axis.
    pixels = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    content = [{"type": "image"}, {"type": "text", "text": _QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = processor(images=[Image.fromarray(pixels)], text=[text], return_tensors="pt")
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


@torch.inference_mode()
def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits f32[1, T, V]."""
    found: Tensor = model(**inputs).logits.float()
    return found


def _check(folder: Path, before_inputs: dict[str, Tensor], before: Tensor) -> None:
    """Open the folder with transformers alone and compare.

    Raises:
        InputError: Another prompt, other pixels or other logits; says by how much.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    inputs = _inputs(AutoProcessor.from_pretrained(folder), model.dtype)
    changed = [name for name, value in before_inputs.items() if name not in inputs or not torch.equal(value, inputs[name])]
    if changed:
        raise InputError(f"the reopened processor gives other {', '.join(changed)}", where=folder, mend=_REPORT)
    after = _logits(model, inputs)
    difference, scale = float((after - before).abs().max()), max(1.0, float(before.abs().max()))
    # Written so that NaN fails.
    if not difference <= _TOLERANCE[model.dtype] * scale:
        what = f"the reopened model's logits differ by {difference:.2g} (largest logit {scale:.2g})"
        raise InputError(what, where=folder, mend=_REPORT)
    log.info("logits differ by at most %.1g", difference)
