"""Features of a frozen encoder: computed once, kept on disk."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmkit.data.images import PAD_COLOUR, Fit, Pixels, decode_image, fit_square
from mmkit.data.labelled import LabelledSource
from mmkit.data.loader import one_thread
from mmkit.data.skipped import SampleError
from mmkit.encoders.vit import VisionEncoder
from mmkit.errors import InputError

log = logging.getLogger(__name__)


class Squares(Dataset["Pixels | str"]):
    """Decoded pictures; of one that cannot be used the reason, for an exception of a worker would arrive as a traceback."""

    def __init__(
        self,
        read: Callable[[int], bytes],
        count: int,
        *,
        size: int,
        fit: Fit,
        max_pixels: int,
        fill: tuple[int, int, int] = PAD_COLOUR,
    ) -> None:
        """Take what gives the bytes of a picture by number (it must pickle), how many there are, and how they become squares."""
        self.read, self.count, self.size, self.fit, self.max_pixels, self.fill = read, count, size, fit, max_pixels, fill

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Pixels | str:
        try:
            image = decode_image(self.read(index), max_pixels=self.max_pixels)
        except SampleError as error:
            return str(error)
        return fit_square(image, self.size, fit=self.fit, fill=self.fill)


def pixel_batches(
    source: LabelledSource,
    indices: Sequence[int] | None = None,
    *,
    size: int,
    workers: int = 0,
    max_pixels: int = 100_000_000,
    batch_size: int = 64,
    fit: Fit = "crop",
) -> Iterator[Tensor]:
    """Pictures of a labelled set as squares, in order; decoded in loader processes.

    Args:
        source: The set.
        indices: Which of its pictures; None: all.
        size: Side S of the squares in pixels.
        workers: Loader processes; the result does not depend on it.
        max_pixels: A picture with more is refused.
        batch_size: Pictures of a batch.
        fit: How a picture becomes a square.

    Yields:
        uint8 ``[B, 3, S, S]``.

    Raises:
        InputError: A picture cannot be used; a score over the others would be another score.
    """
    indices = range(len(source)) if indices is None else indices
    # DataLoader returns batches in the sampler's order, whichever worker is first.
    loader: DataLoader[Pixels | str] = DataLoader(
        Squares(source.pictures.read, len(source), size=size, fit=fit, max_pixels=max_pixels),
        batch_size=batch_size,
        sampler=indices,
        num_workers=workers,
        collate_fn=_stack,
        # Else the non_blocking copies below would block.
        pin_memory=torch.cuda.is_available(),
        # Workers only: in the main process it would slow the encoder down and deafen it to Ctrl-C.
        worker_init_fn=one_thread if workers else None,
    )
    for number, batch in enumerate(loader):
        if isinstance(batch, Tensor):
            yield batch
            continue
        place, reason = batch
        # Batches come in order, so number and place give the picture back.
        # Named by the set's own key: the number of a picture says nothing to whoever has to repair it.
        key = source.keys[indices[number * batch_size + place]]
        raise InputError(reason, where=key, mend="repair the picture or remove it from the set")


def _stack(squares: list[Pixels | str]) -> Tensor | tuple[int, str]:
    """A batch uint8 ``[B, 3, S, S]``, or the place of its first unusable picture with the reason."""
    # The first is enough: the caller refuses the whole set for it.
    for place, square in enumerate(squares):
        if isinstance(square, str):
            return place, square
    return torch.from_numpy(np.stack([square for square in squares if not isinstance(square, str)]))


def extract_features(
    encoder: VisionEncoder,
    pixel_batches: Iterable[Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    kind: Literal["pooled", "tokens"] = "pooled",
    layer: int | None = None,
) -> Tensor:
    """Run a frozen encoder over batches of pictures.

    Args:
        encoder: Moved to `device`; its training mode is restored afterwards.
        pixel_batches: uint8 or normalised float [B, 3, H, W] each.
        device: Where to compute.
        dtype: Of the result; bfloat16 and float16 also compute under autocast.
        autocast: Compute under autocast in this dtype, whatever the result's is.
        kind: ``pooled`` for one vector a picture, ``tokens`` for its patch tokens.
        layer: With ``tokens``: the block to take them from, see `VisionEncoder.tokens`.

    Returns:
        On the CPU: [M, D] pooled, or [M, N, D] tokens.
    """
    device = torch.device(device)
    was_training = encoder.training
    # Dropout, patch dropping and batch norms of the training mode would make features depend on the batch.
    encoder.to(device).eval()
    # A half-precision result is not worth computing in float32.
    half = autocast or (dtype if dtype in (torch.bfloat16, torch.float16) else None)
    parts = []
    with torch.inference_mode(), torch.autocast(device.type, dtype=half, enabled=half is not None):
        for pixels in pixel_batches:
            # uint8 until here: a quarter of the bytes of floats to move.
            pixels = pixels.to(device, non_blocking=True)
            features = encoder(pixels) if kind == "pooled" else encoder.tokens(pixels, layer)  # [B, D] or [B, N, D]
            # To the host batch by batch: patch tokens of a whole set would not fit on the device.
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
        # Atomic within one folder: a reader in another process opens the old file, the new one, or none.
        temporary.replace(file)
        return file

    def get(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """The tensor under a key, made and saved first if it is not there."""
        features = self.load(key)
        # A cache and no product: a missing or damaged entry costs time, never the run.
        if features is None:
            features = make()
            self.save(key, features)
        return features
