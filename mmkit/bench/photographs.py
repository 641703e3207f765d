"""Photograph-like pictures from a seed, or a folder of the user's, as the shards that the loader benchmark reads."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from mmkit.data.shards import write_shard
from mmkit.errors import InputError

_SHARDS = 2


def make_photographs(count: int, seed: int = 0, *, size: tuple[int, int] = (1024, 768)) -> list[Image.Image]:
    """Pictures with the statistics of natural ones: things of every size that hide each other, and a 1/f texture over them.

    Occlusion gives edges and flat areas as in photographs ("dead leaves"), which is what the time and the length of a JPEG depend
    on; noise alone would be far too long, smooth gradients too short.

    Args:
        count: Pictures.
        seed: Of the draws.
        size: Width and height in pixels.

    Returns:
        RGB pictures, always the same for the same arguments.
    """
    width, height = size
    pictures = []
    for number in range(count):
        # Each from its own generator: more pictures leave the first ones as they are.
        rng = np.random.default_rng([seed, number])
        canvas = Image.new("RGB", size, _colour(rng.normal(128, 45) + rng.normal(0, 18, 3)))
        draw = ImageDraw.Draw(canvas)
        # Radii by the inverse cube law: the statistics of a scene do not change with the distance.
        radii = 6 / np.sqrt(rng.uniform((6 / height) ** 2, 1, 600))
        for radius in radii[rng.permutation(len(radii))]:
            x, y, stretch = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.6, 1.7)
            # Grey on the whole, as most surfaces are.
            colour = rng.normal(128, 45) + rng.normal(0, 18, 3)
            draw.ellipse((x - radius * stretch, y - radius, x + radius * stretch, y + radius), fill=_colour(colour))
        # The second part is the noise of a sensor, which has no neighbours.
        texture = _pink_noise(width, height, rng)[..., None] * 10 + rng.normal(0, 1, (height, width, 1))
        pictures.append(Image.fromarray(np.clip(np.asarray(canvas) + texture, 0, 255).astype(np.uint8)))
    return pictures


def _colour(values: np.ndarray) -> tuple[int, int, int]:
    """A colour of Pillow's."""
    red, green, blue = (int(v) for v in np.clip(values, 0, 255))
    return red, green, blue


def _pink_noise(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """float[height, width] whose amplitude falls with the frequency, of deviation 1."""
    spectrum = np.fft.rfft2(rng.standard_normal((height, width)))
    # As rfft2 lays it out: all rows, half of the columns. f[height, width // 2 + 1]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    # The mean has no frequency; any divisor will do, as it is taken away.
    frequency[0, 0] = 1
    noise = np.fft.irfft2(spectrum / frequency, (height, width))
    scaled: np.ndarray = (noise - noise.mean()) / noise.std()
    return scaled


def read_photographs(folder: str, count: int) -> list[Image.Image]:
    """The first pictures of a folder in name order, RGB; from the beginning again if it has fewer.

    Args:
        folder: Folder of JPEGs.
        count: Pictures.

    Raises:
        InputError: There is none.
    """
    # By name and not at random, so that a figure can be measured again.
    files = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:count]
    if not files:
        raise InputError("no JPEG here", where=folder, mend="give a folder with .jpg files as pictures=FOLDER")
    opened = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in files]
    # Repeats rather than fewer: batches are to be whole whatever the folder holds.
    return [opened[i % len(opened)] for i in range(count)]


def encode_photographs(pictures: list[Image.Image], size: tuple[int, int], *, quality: int = 90) -> list[bytes]:
    """JPEGs of one size, 4:2:0; cut in the middle to its aspect first, so that nothing is distorted.

    Args:
        pictures: RGB.
        size: Width and height in pixels.
        quality: Of the JPEGs.
    """
    encoded = []
    for picture in pictures:
        buffer = io.BytesIO()
        # Subsampled as nearly all photographs on the web are; Pillow's default depends on the quality.
        ImageOps.fit(picture, size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
        encoded.append(buffer.getvalue())
    return encoded


def write_samples(path: Path, samples: list[tuple[str, bytes, str]]) -> None:
    """A shard of these keys, pictures and captions."""
    pairs = (((f"{key}.jpg", picture), (f"{key}.txt", caption.encode())) for key, picture, caption in samples)
    write_shard(path, itertools.chain.from_iterable(pairs))


def write_shards(encoded: list[bytes], folder: Path) -> list[Path]:
    """Webdataset shards of pictures with a short caption each.

    Args:
        encoded: JPEGs.
        folder: Made if it is not there.

    Returns:
        The shards in order.
    """
    shards = [folder / f"{number:05d}.tar" for number in range(min(_SHARDS, len(encoded)))]
    for number, shard in enumerate(shards):
        # In turn, so that shards differ by one picture at most.
        rows = range(number, len(encoded), len(shards))
        write_samples(shard, [(f"{i:06d}", encoded[i], f"photograph {i}") for i in rows])
    return shards
