"""Drawing a scene: a noisy background, jittered shapes, a rendered word."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmkit.data.world.scene import PLACES, Group, Scene

RGB = {
    "red": (220, 40, 40),
    "green": (50, 185, 60),
    "blue": (60, 90, 235),
    "yellow": (235, 220, 60),
    "purple": (165, 65, 205),
    "orange": (245, 140, 30),
}
JPEG_QUALITY = 92
# Share of the height that the word's strip takes; the three rows of shapes lie below it.
WORD_STRIP = 0.25
# Pillow's shapes have hard edges; drawn four times as large and averaged, they get soft ones as in a photograph.
_SUPERSAMPLE = 4


def draw_scene(scene: Scene, size: int, rng: np.random.Generator) -> Image.Image:
    """Render a scene.

    Args:
        scene: What to draw.
        size: Side in pixels.
        rng: Background, jitter and brightness of this picture.

    Returns:
        RGB picture of ``size`` x ``size``.
    """
    scale = size * _SUPERSAMPLE
    # Dark enough for every colour and for the light letters to stand out.
    grey = int(rng.integers(15, 75))
    canvas = Image.new("RGB", (scale, scale), (grey, grey, grey))
    pen = ImageDraw.Draw(canvas)
    for group in scene.groups:
        _draw_group(pen, group, scale, rng)
    if scene.word:
        _draw_word(pen, scene.word, scale, rng)
    small = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float32)
    # Noise comes after the reduction, which would average it away.
    noisy = small * rng.uniform(0.85, 1.1) + rng.normal(0, 5, small.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def encode_jpeg(image: Image.Image) -> bytes:
    """The picture as JPEG, without chroma subsampling (small shapes would bleed)."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _draw_group(pen: ImageDraw.ImageDraw, group: Group, scale: int, rng: np.random.Generator) -> None:
    """The shapes of a group side by side, somewhere in their row below the word's strip.

    Cells are a quarter of the side: two patches of a ViT with an eighth of the side as patch, so that shapes can be told apart.
    """
    cell = scale / 4
    y0 = scale * WORD_STRIP + PLACES.index(group.place) * cell
    # Any of the four columns the row has room for, so that no place alone tells the count.
    first = int(rng.integers(0, 4 - group.count + 1))
    # 18 of 255: no two equal reds, while red and orange stay apart.
    color = tuple(int(np.clip(v + rng.integers(-18, 19), 0, 255)) for v in RGB[group.color])
    for i in range(group.count):
        # With the jitter below about half a cell: neighbours hardly touch.
        radius = cell * rng.uniform(0.38, 0.45)
        x = (first + i + 0.5 + rng.uniform(-0.06, 0.06)) * cell
        y = y0 + (0.5 + rng.uniform(-0.06, 0.06)) * cell
        _draw_shape(pen, group.shape, x, y, radius, color)


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, color: tuple[int, ...]) -> None:
    """One shape around (x, y), about 2 r wide."""
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "square":
        # 0.9: nearer in area to the circle, so that size alone does not give the shape away.
        pen.rectangle((x - r * 0.9, y - r * 0.9, x + r * 0.9, y + r * 0.9), fill=color)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + r * 0.8), (x - r, y + r * 0.8)], fill=color)
    elif shape == "cross":
        w = r * 0.36
        for turn in (math.pi / 4, -math.pi / 4):
            c, s = math.cos(turn), math.sin(turn)
            corners = [(-r * 1.15, -w), (r * 1.15, -w), (r * 1.15, w), (-r * 1.15, w)]
            pen.polygon([(x + a * c - b * s, y + a * s + b * c) for a, b in corners], fill=color)
    else:
        pen.ellipse((x - r, y - r, x + r, y + r), outline=color, width=max(1, int(r * 0.45)))


def _draw_word(pen: ImageDraw.ImageDraw, word: str, scale: int, rng: np.random.Generator) -> None:
    """The word in light letters at the top, as large as its strip allows."""
    # Pillow's built-in font: no system font, whose version would change the pictures.
    font = ImageFont.load_default(size=scale * 0.27)
    left, upper, right, lower = pen.textbbox((0, 0), word, font=font)
    # textbbox does not begin at the origin: without taking left and upper off, the word hangs out of its strip.
    x = (scale - (right - left)) / 2 - left + rng.uniform(-0.04, 0.04) * scale
    y = (scale * WORD_STRIP - (lower - upper)) / 2 - upper + rng.uniform(-0.015, 0.015) * scale
    level = int(rng.integers(215, 256))
    pen.text((x, y), word, font=font, fill=(level, level, level))
