"""Looks at an encoder while it trains: k-NN on labelled pictures, and the top tags of a few fixed ones."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mmkit.config import LabelledDataConfig, MonitorConfig
from mmkit.data.images import ImageRef, decode_image, fit_square
from mmkit.data.labelled import LabelledSource, open_labelled
from mmkit.data.skipped import SampleError
from mmkit.distributed.engine import Engine
from mmkit.encoders.features import pixel_batches
from mmkit.encoders.head import SuperClassHead
from mmkit.encoders.labels import CaptionLabels
from mmkit.encoders.probe import knn
from mmkit.encoders.vit import VisionEncoder
from mmkit.errors import InputError
from mmkit.training.objective import Finding, Monitor

_SIDE = 224  # of a picture on a sheet, in pixels
# Room for a line of the 14-point font below.
_LINE = 18


class KnnMonitor:
    """Accuracy of weighted k-NN on pooled features; every process extracts its share of the pictures."""

    def __init__(self, encoder: VisionEncoder, config: MonitorConfig, *, workers: int) -> None:
        """Open both sets.

        Raises:
            InputError: No labelled pictures there, or a test class that the training set does not have.
        """
        assert config.every is not None and config.knn_train is not None and config.knn_test is not None
        self.every, self.encoder, self.k, self.workers = config.every, encoder, config.k, workers
        data = LabelledDataConfig(
            train=config.knn_train, test=config.knn_test, label=config.label, image_root=config.image_root, limit=config.limit
        )
        self.max_pixels = data.max_pixels
        # Opened when the run begins: a wrong path must not end it hours later.
        self.sets = [open_labelled(config.knn_train, data), open_labelled(config.knn_test, data)]
        # Those that vote: a class only of the test set could never be right.
        classes = sorted(set(self.sets[0].labels))
        self.targets = [torch.tensor(part.targets(classes)) for part in self.sets]

    def look(self, engine: Engine) -> Finding:
        """``knn_accuracy`` of the weights as they are."""
        # Features f[N, D] and f[M, D], classes i64[N] and i64[M].
        (train_x, test_x), (train_y, test_y) = ([self._features(part, engine) for part in self.sets], self.targets)
        # Under the loop's autocast the cosines would be bf16, whose steps near 1 are as large as the differences that count.
        with torch.autocast(train_x.device.type, enabled=False):
            found = knn(train_x, train_y.to(train_x.device), test_x, test_y.to(test_x.device), k=self.k)
        return Finding(numbers={"knn_accuracy": found.accuracy})

    def _features(self, source: LabelledSource, engine: Engine) -> Tensor:
        """Pooled features of a set in order, float[N, D], the same on every process."""
        size, world = len(source), engine.world_size
        # Every process takes equally many, or they could not be gathered: the last ones see a picture again.
        each = -(-size // world)
        # In turn and not in blocks, so that padding falls on the last round only.
        mine = [min(i * world + engine.rank, size - 1) for i in range(each)]
        batches = pixel_batches(source, mine, size=self.encoder.image_size, workers=self.workers, max_pixels=self.max_pixels)
        features = torch.cat([self.encoder(pixels.to(engine.device)).float() for pixels in batches])
        gathered, _ = engine.gather_features(features)
        # Rank r holds pictures r, r + W, ...: transposing puts them back in order, and the padding at the end is cut.
        return gathered.view(world, each, -1).transpose(0, 1).flatten(0, 1)[:size]


class TagsMonitor:
    """A sheet of a few fixed pictures with their most likely labels, for the tracker."""

    def __init__(
        self, encoder: VisionEncoder, head: SuperClassHead, labels: CaptionLabels, images: Iterable[str], *, every: int, tags: int
    ) -> None:
        """Read the pictures.

        Raises:
            InputError: A picture cannot be read.
        """
        self.every, self.encoder, self.head, self.labels, self.tags = every, encoder, head, labels, tags
        self.pictures = []
        for path in map(Path, images):
            try:
                self.pictures.append(decode_image(ImageRef(str(path)).read()))
            except SampleError as error:
                raise InputError(str(error), where=f"monitor.images {path}", mend="give picture files") from None
        # Prepared once: the point is that the pictures never change.
        self.pixels = torch.from_numpy(np.stack([fit_square(p, encoder.image_size, fit="crop") for p in self.pictures]))

    def look(self, engine: Engine) -> Finding:
        """The sheet, uint8 ``[H, W, 3]``."""
        found = self.head.top_tags(self.encoder(self.pixels.to(engine.device)), self.labels, k=self.tags)
        return Finding(pictures={"top tags": draw_tags(self.pictures, found)})


def draw_tags(pictures: list[Image.Image], tags: list[list[tuple[str, float]]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pictures side by side, five in a row, each with its tags and their probabilities below: uint8 ``[H, W, 3]``."""
    columns = min(5, len(pictures))
    height = _SIDE + _LINE * (max(len(found) for found in tags) + 1)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * _SIDE, rows * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for number, (picture, found) in enumerate(zip(pictures, tags, strict=True)):
        left, top = number % columns * _SIDE, number // columns * height
        small = picture.copy()
        # thumbnail keeps the aspect, so people recognise their pictures.
        small.thumbnail((_SIDE - 8, _SIDE - 8))
        sheet.paste(small, (left + 4, top + 4))
        for line, (word, probability) in enumerate(found):
            text = f"{probability:6.1%}  {textwrap.shorten(word, 20, placeholder='...')}"
            pen.text((left + 8, top + _SIDE + _LINE * line), text, fill="black", font=font)
    return np.asarray(sheet, dtype=np.uint8)


def make_monitors(
    config: MonitorConfig,
    encoder: VisionEncoder,
    *,
    head: SuperClassHead | None = None,
    labels: CaptionLabels | None = None,
    workers: int = 0,
) -> list[Monitor]:
    """The monitors that a recipe asks for.

    Raises:
        InputError: Their pictures cannot be read.
    """
    found: list[Monitor] = []
    if config.every is None:
        return found
    if config.knn_train is not None:
        found.append(KnnMonitor(encoder, config, workers=workers))
    if config.images:
        assert head is not None and labels is not None, "top tags need a label head"
        found.append(TagsMonitor(encoder, head, labels, config.images, every=config.every, tags=config.tags))
    return found
