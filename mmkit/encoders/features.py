"""Features of a frozen encoder: computed once, kept on disk."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmkit.encoders.vit import VisionEncoder

log = logging.getLogger(__name__)


def extract_features(
    encoder: VisionEncoder,
    pixel_batches: Iterable[Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kind: Literal["pooled", "tokens"] = "pooled",
    layer: int | None = None,
) -> Tensor:
    """Run a frozen encoder over batches of pictures.

    Args:
        encoder: Moved to `device`; its training mode is restored afterwards.
        pixel_batches: uint8 or normalised float [B, 3, H, W] each.
        device: Where to compute.
        dtype: Of the result; bfloat16 and float16 also compute under autocast.
        kind: ``pooled`` for one vector a picture, ``tokens`` for its patch tokens.
        layer: With ``tokens``: the block to take them from, see `VisionEncoder.tokens`.

    Returns:
        On the CPU: [M, D] pooled, or [M, N, D] tokens.
    """
    device = torch.device(device)
    was_training = encoder.training
    encoder.to(device).eval()
    half = dtype in (torch.bfloat16, torch.float16)
    parts = []
    with torch.inference_mode(), torch.autocast(device.type, dtype=dtype if half else None, enabled=half):
        for pixels in pixel_batches:
            pixels = pixels.to(device, non_blocking=True)
            features = encoder(pixels) if kind == "pooled" else encoder.tokens(pixels, layer)
            parts.append(features.to(dtype).cpu())
    encoder.train(was_training)
    # Inference tensors cannot enter autograd later; the copy made here, outside the mode, can.
    shape = (0, encoder.width) if kind == "pooled" else (0, encoder.num_tokens, encoder.width)
    return torch.cat(parts) if parts else torch.empty(shape, dtype=dtype)


class FeatureCache:
    """Tensors in a folder under the fingerprint of what they were made from (encoder, data, settings)."""

    def __init__(self, folder: str | Path) -> None:
        """Use a folder; it is made when something is saved."""
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        """The file of a key; keys are hashed, so they may be long and hold any character."""
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def load(self, key: str) -> Tensor | None:
        """The tensor saved under a key, or None; a damaged file counts as none."""
        file = self.path(key)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as stored:
                # The file name is a shortened hash; the full key inside settles it.
                if (stored.metadata() or {}).get("key") != key:
                    return None
                tensor: Tensor = stored.get_tensor("features")
                return tensor
        except (SafetensorError, OSError) as error:
            log.warning("feature cache %s is damaged (%s) and will be made again", file, error)
            return None

    def save(self, key: str, features: Tensor) -> Path:
        """Keep a tensor; readers see either nothing or all of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # The pid keeps two processes that make the same features apart; the last rename wins, both are right.
        file = self.path(key)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        save_file({"features": features.detach().cpu().contiguous()}, temporary, metadata={"key": key})
        temporary.replace(file)
        return file

    def get(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """The tensor under a key, made and saved first if it is not there."""
        features = self.load(key)
        if features is None:
            features = make()
            self.save(key, features)
        return features
