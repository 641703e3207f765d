"""Labelled pictures for fine-tuning: augmentation by the sample's own random numbers, and mixing of a batch with itself."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from mmkit.data.decode import Decoder, training_crop
from mmkit.data.images import Pixels, decode_image, fit_square, to_chw
from mmkit.data.labelled import LabelledSource
from mmkit.errors import InputError
from mmkit.training.objective import Batch


class Mixed(NamedTuple):
    """Pictures mixed with the batch in reverse, float ``[B, 3, S, S]``, and the share of each that is its own."""

    pixels: Tensor
    share: float


def mix(pixels: Tensor, *, mixup: float, cutmix: float) -> Mixed:
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899) of a micro-batch with itself in reverse order, as timm's Mixup.

    All numbers come from torch's global CPU generator, which the loop seeds before every step: a continued run draws the same.

    Args:
        pixels: float[B, 3, S, S], normalised.
        mixup: Alpha of its Beta distribution; 0: never.
        cutmix: Likewise; with both, either with probability one half.

    Returns:
        New pictures and their own share.
    """
    # On the CPU: a draw on the device would have to be read back.
    cut = bool(cutmix) and (not mixup or float(torch.rand(())) < 0.5)
    alpha = torch.tensor(cutmix if cut else mixup)
    # One share a micro-batch and not one a picture, as timm's default mode.
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    if not cut:
        return Mixed(share * pixels + (1 - share) * pixels.flip(0), share)
    height, width = pixels.shape[-2:]
    rows, columns = (_cut_range(size, share) for size in (height, width))
    mixed = pixels.clone()
    mixed[:, :, rows, columns] = pixels.flip(0)[:, :, rows, columns]
    # At the border the box is clipped, so its area is counted and not taken from the draw.
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return Mixed(mixed, 1 - area / (height * width))


def _cut_range(size: int, share: float) -> slice:
    """One side of CutMix's box: sqrt(1 - share) of the picture's, around a random centre, clipped."""
    length = int(size * (1 - share) ** 0.5)
    centre = int(torch.randint(size, ()))
    # An odd pixel goes to the far side, as in timm's rand_bbox.
    return slice(max(0, centre - length // 2), min(size, centre + (length + 1) // 2))


class FinetuneSample(NamedTuple):
    """A picture (uint8 ``[3, S, S]``), the number of its class, and its key."""

    pixels: Pixels
    target: int
    key: str


class Augment(NamedTuple):
    """How a training picture is varied: area of the crop, flip, timm's RandAugment by its name, and the crop's decoder."""

    crop_scale: tuple[float, float]
    flip: bool
    rand_augment: str | None
    decoder: Decoder = "fast"


class FinetuneSamples:
    """Labelled pictures; augmented for training, the centre for validation."""

    def __init__(
        self, source: LabelledSource, targets: list[int], *, size: int, max_pixels: int, augment: Augment | None = None
    ) -> None:
        self.source, self.targets, self.size, self.max_pixels, self.augment = source, targets, size, max_pixels, augment
        self._policy = _rand_augment(augment.rand_augment, size) if augment is not None and augment.rand_augment else None

    def __len__(self) -> int:
        return len(self.source)

    def describe(self, index: int) -> tuple[str, str]:
        """Set and key of a picture."""
        return self.source.location, self.source.keys[index]

    def load(self, index: int, rng: np.random.Generator) -> FinetuneSample:
        """Decode and augment one picture."""
        data = self.source.pictures.read(index)
        key, target = self.source.keys[index], self.targets[index]
        how = self.augment
        if how is None:
            # The view of the score at the end (`pixel_batches`).
            return FinetuneSample(fit_square(decode_image(data, max_pixels=self.max_pixels), self.size, fit="crop"), target, key)
        # Crop, flip, RandAugment: timm's order (transforms_factory.py).
        pixels = training_crop(data, self.size, rng, scale=how.crop_scale, decoder=how.decoder, max_pixels=self.max_pixels)
        if how.flip and rng.random() < 0.5:
            # A view with negative stride cannot become a tensor.
            pixels = np.ascontiguousarray(pixels[:, :, ::-1])
        if self._policy is not None:
            # timm draws from the global generators; left alone they would depend on the loader's workers.
            with _global_numbers(rng):
                pixels = to_chw(self._policy(Image.fromarray(pixels.transpose(1, 2, 0))))
        return FinetuneSample(pixels, target, key)


def _rand_augment(name: str, size: int) -> Any:
    """Timm's RandAugment (arXiv 1909.13719) by its name, shifts scaled to the picture and gaps filled with CLIP's mean colour."""
    try:
        # 0.45 of the side as in timm's own training transforms (transforms_factory.py).
        policy = rand_augment_transform(name, {"translate_const": int(size * 0.45), "img_mean": (122, 116, 104)})
    except (AssertionError, ValueError, KeyError) as error:
        what = f"no RandAugment {name!r}{f' ({error})' if str(error) else ''}"
        raise InputError(what, where="rand_augment", mend="use a name such as rand-m9-mstd0.5-inc1") from None
    for op in policy.ops:
        if op.name.startswith("Posterize"):
            op.level_fn = functools.partial(_some_bits, op.level_fn)
    return policy


def _some_bits(level_fn: Callable[..., tuple[int]], level: float, hparams: dict[str, Any]) -> tuple[int]:
    """Bits that timm's posterize keeps, at least one: at its strongest it asks for none, which newer Pillow refuses."""
    return (max(1, level_fn(level, hparams)[0]),)


@contextlib.contextmanager
def _global_numbers(rng: np.random.Generator) -> Iterator[None]:
    """Seed Python's and numpy's global generators from a sample's own, and put them back: timm draws from them."""
    # Put back afterwards, so that nothing else in the process changes with the augmentation.
    before, before_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(int(rng.integers(1 << 62)))
    # numpy's old generator takes seeds below 2**32 only.
    np.random.seed(int(rng.integers(1 << 32)))  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)  # noqa: NPY002


def collate_labelled_pictures(samples: list[FinetuneSample]) -> Batch:
    """``pixels`` uint8 ``[B, 3, S, S]``, ``targets`` i64 ``[B]``, ``keys``."""
    return {
        "pixels": torch.from_numpy(np.stack([s.pixels for s in samples])),
        "targets": torch.tensor([s.target for s in samples]),
        "keys": [s.key for s in samples],
    }
