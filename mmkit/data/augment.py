"""Colour augmentations of a finished crop, driven by the sample's own random numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from mmkit.data.images import Pixels, to_chw


@dataclasses.dataclass(frozen=True)
class ColorJitter:
    """Random brightness, contrast, saturation and hue in random order, as torchvision's ColorJitter under RandomApply.

    open_clip's ``color_jitter`` and ``color_jitter_prob`` (open_clip/transform.py), which x-cls/superclass' 12.8 B recipe uses.

    Attributes:
        brightness: Factor drawn from ``1 +- brightness``.
        contrast: Likewise.
        saturation: Likewise.
        hue: Shift drawn from ``+- hue`` of the colour circle, at most 0.5.
        probability: Of changing a picture at all.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    probability: float = 1.0

    def __call__(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """Change a picture, uint8 ``[3, H, W]`` to the same."""
        # Imported here: most recipes have no jitter, and torchvision is slow to import.
        from torchvision.transforms import functional

        if rng.random() >= self.probability:
            return pixels
        image = Image.fromarray(pixels.transpose(1, 2, 0))
        ranges = (self.brightness, self.contrast, self.saturation)
        # All are drawn whether used or not: switching one off leaves the others' draws as they were. max, as torchvision
        # has it: a strength above 1 must give no negative factor.
        factors = [rng.uniform(max(0.0, 1 - r), 1 + r) for r in ranges]
        shift = rng.uniform(-self.hue, self.hue)
        adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
        strengths = (*ranges, self.hue)
        # In random order, for the operations do not commute.
        for which in rng.permutation(4):
            if not strengths[which]:
                continue  # a shift of hue by 0 goes by way of HSV, and rounds
            image = functional.adjust_hue(image, shift) if which == 3 else adjust[which](image, factors[which])
        return to_chw(image)


def gray_scale(pixels: Pixels) -> Pixels:
    """The picture without colour, uint8 ``[3, H, W]`` to the same (ITU-R 601 luma, as torchvision's Grayscale)."""
    # Three equal channels again: the tower takes RGB.
    gray = Image.fromarray(pixels.transpose(1, 2, 0)).convert("L")
    return to_chw(Image.merge("RGB", (gray, gray, gray)))
