"""Pictures: from bytes to a square of uint8 pixels, with every oddity handled or refused with a reason."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mmkit.data.bounds import MAX_BYTES, refuse_costly, refuse_long, refuse_tags
from mmkit.data.reading import read_file, read_range
from mmkit.data.skipped import SampleError

Fit = Literal["squash", "crop", "pad"]
Pixels = NDArray[np.uint8]
# Transparent pixels are shown on white, as a browser would show them.
BACKGROUND = (255, 255, 255)
# CLIP's mean colour, with which LLaVA pads.
PAD_COLOUR = (122, 116, 104)
# Formats that picture sets hold. Pillow knows 40 more, some of which start a program (EPS) or have no bound on their time.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# What Pillow raises on damaged files: seen on mutated JPEG, PNG, TIFF, WebP, AVIF and on broken EXIF blocks.
DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error,
    AttributeError, IndexError, KeyError, OverflowError, TypeError,
)  # fmt: skip
# A padded square larger than this is made smaller first: one row of 100,000 pixels would need 30 GB.
_LARGEST_SQUARE = 8192


@dataclasses.dataclass(frozen=True)
# A slice rather than an unpacked file: shards are read in place, so member names such as ../../x never reach the file system.
class ImageRef:
    """Where the bytes of a picture lie: a whole file, or a slice of a tar.

    Attributes:
        path: File on disk.
        offset: First byte of the picture in it.
        size: Number of bytes; -1 is the whole file.
    """

    path: str
    offset: int = 0
    size: int = -1

    def read(self, max_bytes: int = MAX_BYTES) -> bytes:
        """The bytes.

        Args:
            max_bytes: A longer picture is refused before a byte of it is read.

        Raises:
            SampleError: Missing, unreadable or too long.
        """
        if self.size < 0:
            return read_file(self.path, self.offset, max_bytes)
        refuse_long(self.size, max_bytes)
        return read_range(self.path, self.offset, self.size)


def decode_image(data: bytes, *, max_pixels: int = 100_000_000) -> Image.Image:
    """Decode one picture to upright RGB, pixel for pixel as Pillow does: what evaluation and validation see.

    EXIF rotation is applied, transparency is composed on white, 16-bit grey is scaled (not clipped), CMYK is converted, an
    animation gives its first frame.

    Args:
        data: Encoded bytes, of one of `FORMATS`.
        max_pixels: Larger pictures are refused from their header, before any memory is spent.

    Raises:
        SampleError: Empty, no picture, too large, too costly for its size (see `mmkit.data.bounds`), or cut off (a half-grey
            picture must not be trained on).
    """
    return upright_rgb(open_picture(data, max_pixels=max_pixels))


def open_picture(data: bytes, *, max_pixels: int = 100_000_000) -> Image.Image:
    """The header of a picture: its size, mode and format are known, no pixel is decoded.

    Args:
        data: Encoded bytes, of one of `FORMATS`.
        max_pixels: Larger pictures are refused.

    Raises:
        SampleError: As `decode_image`, for what the header tells.
    """
    if not data:
        raise SampleError("the file is empty")
    refuse_costly(data)
    try:
        with warnings.catch_warnings(), _reasons():
            # Our own limit decides, the same way on every run; Pillow's warns once a process.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_known_formats())
    except Image.DecompressionBombError:
        # Pillow has a limit of its own, which holds where max_pixels is higher.
        limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        raise SampleError(f"its header claims more pixels than the limit of {limit}") from None
    except Image.UnidentifiedImageError:
        # The first bytes tell an HTML error page or a Git LFS pointer at a glance.
        start = data[:15].decode("latin-1").encode("unicode_escape").decode()
        raise SampleError(f"is no picture (starts with {start!r})") from None
    if image.width * image.height > max_pixels:
        raise SampleError(f"{image.width} x {image.height} pixels are over the limit of {max_pixels}")
    # PNG and WebP have their Exif block anywhere; nothing has read its tags yet.
    if isinstance(exif := image.info.get("exif"), bytes):
        refuse_tags(exif)
    return image


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened picture: `open_picture` and this are `decode_image`.

    Raises:
        SampleError: It is damaged or cut off.
    """
    try:
        with _reasons():
            return _to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        # A GIF tells the size of its first frame here only.
        raise SampleError("a part of it claims more pixels than Pillow's limit") from None


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    # init and not preinit: the latter knows five formats.
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """What Pillow raises on damaged files becomes the reason of a sample that is left out."""
    try:
        yield
    except (Image.DecompressionBombError, Image.UnidentifiedImageError):
        raise
    except DECODING_ERRORS as error:
        raise SampleError(f"cannot be decoded ({' '.join(str(error).split()) or type(error).__name__})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any Pillow mode."""
    # A PNG may name one colour as transparent.
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    # 16-bit pictures come as I or I;16; a float picture has no fixed range, so its own maximum is white.
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it has pixels that are no numbers")
        # Pillow's own convert clips 16-bit values at 255.
        # 1e-9: an all-black float picture would divide by zero.
        top = 65535.0 if image.mode.startswith("I") else max(float(values.max()), 1e-9)
        return Image.fromarray(np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    # Pixels under full transparency may hold any colour; dropping the alpha channel would show it.
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*BACKGROUND, 255))
        canvas.alpha_composite(rgba)
        return canvas.convert("RGB")
    return image.convert("RGB")


def mean_colour(mean: Sequence[float]) -> tuple[int, int, int]:
    """Channel means of an encoder as the colour that pads its pictures: close to zero once normalised, as LLaVA pads."""
    # Rounded down, as LLaVA does (llava/mm_utils.py, expand2square).
    red, green, blue = (int(255 * value) for value in mean)
    return red, green, blue


def fit_square(image: Image.Image, size: int, *, fit: Fit, fill: tuple[int, int, int] = PAD_COLOUR) -> Pixels:
    """The evaluation view of a picture: a square of ``size`` pixels, bicubic.

    Args:
        image: RGB.
        size: Side in pixels.
        fit: ``squash`` ignores the aspect (SigLIP), ``crop`` resizes the short side and cuts the centre (CLIP), ``pad`` pastes
            on a square of ``fill`` (LLaVA-1.5's instruction stage; the default fill is CLIP's mean colour).
        fill: Colour of the padding.

    Returns:
        uint8 ``[3, size, size]``.
    """
    width, height = image.size
    if fit == "squash":
        square = image.resize((size, size), Image.Resampling.BICUBIC)
    elif fit == "crop":
        side = min(width, height)
        # Fractions of a pixel are fine: resize takes the box as it is, and cutting first would round it and cost a copy.
        left, top = (width - side) / 2, (height - side) / 2
        square = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    else:
        side = max(width, height)
        # The square's side is the longer one, so its area is not bounded by the limit on pixels.
        if side > max(_LARGEST_SQUARE, size):
            scale = max(_LARGEST_SQUARE, size) / side
            return fit_square(image.resize((max(1, int(width * scale)), max(1, int(height * scale)))), size, fit="pad", fill=fill)
        canvas = Image.new("RGB", (side, side), fill)
        canvas.paste(image, ((side - width) // 2, (side - height) // 2))
        square = canvas.resize((size, size), Image.Resampling.BICUBIC)
    return to_chw(square)


class Box(NamedTuple):
    """A part of a picture in pixels; fractions are meant as they are."""

    left: float
    top: float
    right: float
    bottom: float


def draw_box(width: int, height: int, rng: np.random.Generator, *, scale: tuple[float, float], ratio: float = 4 / 3) -> Box:
    """A box of random area and aspect (Inception's augmentation, as torchvision's RandomResizedCrop).

    The numbers drawn depend on the size of the picture alone, so that the same crop can be cut by any decoder.

    Args:
        width: Of the upright picture, in pixels.
        height: Likewise.
        rng: Numbers for this sample alone, so that the crop does not depend on the loader's workers.
        scale: Range of the crop's share of the area.
        ratio: Largest aspect ratio; the smallest is its inverse.

    Returns:
        A box within the picture.
    """
    # Ten attempts, then the largest box of an allowed aspect from the centre: torchvision's own rule.
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        # Uniform in the logarithm: 4:3 and 3:4 are equally likely.
        aspect = math.exp(rng.uniform(-math.log(ratio), math.log(ratio)))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return Box(left, top, left + w, top + h)
    # With areas near the whole it is common: for 4:3 pictures at 0.9 to 1 four in ten, which are then seen whole.
    w, h = min(width, height * ratio), min(height, width * ratio)
    left, top = (width - w) / 2, (height - h) / 2
    return Box(left, top, left + w, top + h)


def random_resized_crop(
    image: Image.Image, size: int, rng: np.random.Generator, *, scale: tuple[float, float], ratio: float = 4 / 3
) -> Pixels:
    """A random crop, resized to a square with Pillow's bicubic filter.

    Args:
        image: RGB.
        size: Side in pixels.
        rng: Numbers for this sample alone.
        scale: Range of the crop's share of the area.
        ratio: Largest aspect ratio; the smallest is its inverse.

    Returns:
        uint8 ``[3, size, size]``.
    """
    box = draw_box(*image.size, rng, scale=scale, ratio=ratio)
    # One resampling from the fractional box; crop and resize would round the box to whole pixels first.
    return to_chw(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def to_chw(image: Image.Image) -> Pixels:
    """uint8 ``[3, H, W]`` of an RGB picture."""
    # uint8 to the device: a quarter of float's traffic, and normalising there is far cheaper than in numpy (performance.md 5.2).
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
