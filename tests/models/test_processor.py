"""The saved processor shows other people's software the pictures that training showed the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from mmkit.data.images import fit_square, mean_colour
from mmkit.models.processor import build_processor

from .tiny import tokenizer

MEAN, STD = (0.3, 0.5, 0.6), (0.2, 0.25, 0.3)


def picture(width: int, height: int) -> Image.Image:
    """Smooth colours with a hard edge: resizing shows, and rounding of libraries does not."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / width, 255 * y / height, np.where(x > width / 2, 200.0, 30.0)]
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size", [(90, 50), (40, 70), (48, 48), (20, 30)])
def test_pictures_are_fitted_as_in_training(fit: Any, size: tuple[int, int], tmp_path: Path) -> None:
    made = build_processor(tokenizer("sp"), image_size=32, patch_size=16, mean=MEAN, std=STD, template="demo", image_fit=fit)
    made.save_pretrained(tmp_path)
    reopened = AutoProcessor.from_pretrained(tmp_path)
    image = picture(*size)
    theirs = reopened(images=[image], text=["<image>"], return_tensors="pt")["pixel_values"][0]
    ours = torch.from_numpy(fit_square(image, 32, fit=fit, fill=mean_colour(MEAN))).float() / 255
    ours = (ours - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert theirs.shape == ours.shape == (3, 32, 32)
    # Two levels of 255 on average: Pillow and torchvision round otherwise, and a crop begins on whole pixels there.
    difference = (theirs - ours).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    assert difference.mean() < 2
    if fit == "pad" and size[0] != size[1]:
        corner = theirs[:, 0, 0] * torch.tensor(STD) * 255
        assert corner.abs().max() <= 1, "the bars have the encoder's mean colour"


def test_another_fit_would_show() -> None:
    """What the test above tells apart: each fit gives another picture of a picture that is not square."""
    views = [fit_square(picture(90, 50), 32, fit=fit).astype(int) for fit in ("squash", "crop", "pad")]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(views[first] - views[second]).mean() > 5
