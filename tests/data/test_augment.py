"""Colour augmentations against torchvision's, with equal factors."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional

from mmkit.data.augment import ColorJitter, gray_scale


def picture(seed: int = 0):
    return np.random.default_rng(seed).integers(0, 256, (3, 12, 10), dtype=np.uint8)


def test_each_change_is_torchvisions() -> None:
    pixels = picture()
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, functional.adjust_hue)
    for number, adjust in enumerate(changes):
        strengths = [0.0] * 4
        strengths[number] = 0.4
        found = ColorJitter(*strengths)(pixels, np.random.default_rng(5))
        numbers = np.random.default_rng(5)
        numbers.random()
        factors = [numbers.uniform(1 - s, 1 + s) for s in strengths[:3]]
        factor = numbers.uniform(-strengths[3], strengths[3]) if number == 3 else factors[number]
        assert np.array_equal(found, np.asarray(adjust(image, factor)).transpose(2, 0, 1)), adjust.__name__
        assert not np.array_equal(found, pixels)


def test_probability_and_randomness() -> None:
    pixels = picture()
    never = ColorJitter(0.4, 0.4, 0.4, 0.1, probability=0.0)
    assert np.array_equal(never(pixels, np.random.default_rng(0)), pixels)
    often = ColorJitter(0.4, 0.4, 0.4, 0.1, probability=0.8)
    changed = [not np.array_equal(often(pixels, np.random.default_rng(seed)), pixels) for seed in range(200)]
    assert 0.7 < np.mean(changed) < 0.9
    assert np.array_equal(often(pixels, np.random.default_rng(3)), often(pixels, np.random.default_rng(3)))


@pytest.mark.parametrize("seed", range(3))
def test_gray_is_torchvisions_and_keeps_the_shape(seed: int) -> None:
    pixels = picture(seed)
    found = gray_scale(pixels)
    wanted = functional.rgb_to_grayscale(Image.fromarray(pixels.transpose(1, 2, 0)), num_output_channels=3)
    assert np.array_equal(found, np.asarray(wanted).transpose(2, 0, 1))
    assert (found[0] == found[1]).all() and found.shape == pixels.shape and found.flags.c_contiguous
