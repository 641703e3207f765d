"""The fast way from an encoded picture to a training crop: JPEG decoded at a part of its size, resized by torch.

Where it cannot give the same picture as the exact way (another format, a rotation, CMYK, a damaged file), the exact way is taken.
So which samples are used, and why one is left out, does not depend on the decoder; what differs are pixels of training crops.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image

from mmkit.data.images import DECODING_ERRORS, Box, Pixels, draw_box, open_picture, random_resized_crop, upright_rgb

Decoder = Literal["fast", "exact"]


def training_crop(
    data: bytes,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: float = 4 / 3,
    decoder: Decoder = "fast",
    max_pixels: int = 100_000_000,
) -> Pixels:
    """Decode a picture and cut a random crop of it (`draw_box`), resized to a square.

    ``exact`` decodes the whole picture with Pillow and resizes the fractional box with Pillow's bicubic filter. ``fast`` decides
    the box from the header, decodes a JPEG at 1/2, 1/4 or 1/8 of its size where the box then still covers the square, rounds the
    box to whole decoded pixels, and resizes with torch's antialiased bicubic filter on uint8. Pictures that are no upright RGB or
    grey JPEG get the exact way's result. Both draw the same numbers and refuse the same pictures.

    Args:
        data: Encoded bytes.
        size: Side S of the square in pixels.
        rng: Numbers for this sample alone. After a refusal it is as before, whichever decoder was used.
        scale: Range of the crop's share of the area.
        ratio: Largest aspect ratio of the crop; the smallest is its inverse.
        decoder: ``fast`` or ``exact``.
        max_pixels: As in `decode_image`.

    Returns:
        uint8 ``[3, S, S]``.

    Raises:
        SampleError: As `decode_image`.
    """
    image = open_picture(data, max_pixels=max_pixels)
    if decoder == "fast" and _is_plain_jpeg(image):
        # The replacement of an unusable sample is drawn from the same numbers: they must not have moved when it is refused.
        before = rng.bit_generator.state
        box = draw_box(*image.size, rng, scale=scale, ratio=ratio)
        if (decoded := _decode_part(data, image.size, box, size)) is not None:
            return _resize(*decoded, size)
        rng.bit_generator.state = before
    return random_resized_crop(upright_rgb(image), size, rng, scale=scale, ratio=ratio)


def shrink_factor(box: Box, size: int) -> int:
    """The largest of 8, 4, 2, 1 by which a picture may be shrunk while decoding, so that the box still covers the square.

    Other eighths have no fast inverse transform in libjpeg-turbo and take longer than decoding the whole.

    Args:
        box: In pixels of the whole picture.
        size: Side of the square in pixels.
    """
    side = min(box.right - box.left, box.bottom - box.top)
    return next((factor for factor in (8, 4, 2) if side >= size * factor), 1)


def _is_plain_jpeg(image: Image.Image) -> bool:
    """Whether simplejpeg gives the same pixels as Pillow: JPEG, RGB or grey, stored upright."""
    # Not isinstance: several pictures in one file (MPO) are a subclass.
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return False
    # Reading these takes longer than the rest of the header, and most data sets have removed them.
    if not image.info.keys() & {"exif", "xmp"}:
        return True
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) not in range(2, 9)
    except DECODING_ERRORS:
        # The exact way meets the same fault, and names it.
        return False


def _decode_part(data: bytes, whole: tuple[int, int], box: Box, size: int) -> tuple[Pixels, Box] | None:
    """The picture uint8 ``[H, W, 3]`` at the size that the box needs, and the box in its pixels.

    None where libjpeg has anything to object: Pillow overlooks some of these faults and refuses others.
    """
    factor = shrink_factor(box, size)
    # libjpeg's size of a shrunk picture; asked for as the least size, it allows no smaller factor.
    width, height = (math.ceil(side / factor) for side in whole)
    try:
        # strict: a warning of libjpeg, such as a premature end, raises too.
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError:
        return None
    # By the factor and not by the ratio of the sizes: libjpeg rounds a size up, its pixels stay so many pixels wide.
    # Lossless JPEG cannot be shrunk.
    return (pixels, Box(*(side / factor for side in box))) if pixels.shape == (height, width, 3) else None


def _resize(pixels: Pixels, box: Box, size: int) -> Pixels:
    """A box of a picture uint8 ``[H, W, 3]`` as a square uint8 ``[3, size, size]``."""
    height, width, _ = pixels.shape
    # Whole pixels: torch's filter takes no fractional box, and is five times as fast as Pillow's, which does.
    left, top = min(round(box.left), width - 1), min(round(box.top), height - 1)
    # At least one pixel: a thin box may round to none.
    part = pixels[top : max(top + 1, round(box.bottom)), left : max(left + 1, round(box.right))]
    channels_first = torch.from_numpy(part).permute(2, 0, 1)[None]
    # Antialiased as Pillow's, so that a fine pattern does not alias where the crop is several times the square.
    square = torch.nn.functional.interpolate(channels_first, size=(size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(square[0].numpy())
