"""Pictures with their caption: what SuperClass, CLIP and LiT all train on, sample for sample the same."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch

from mmkit.config import PairDataConfig
from mmkit.data.augment import ColorJitter, gray_scale
from mmkit.data.bounds import MAX_BYTES
from mmkit.data.decode import Decoder, training_crop
from mmkit.data.images import Pixels, decode_image, fit_square
from mmkit.data.pairs import PairSource
from mmkit.data.sources import open_pairs, open_training_pairs, options_of
from mmkit.encoders.vit import VisionEncoder
from mmkit.training.objective import Batch


class PairSample(NamedTuple):
    """A picture (uint8 ``[3, S, S]``), its caption, its key, and the patches it keeps (i64 ``[K]``, or None: all).

    The caption is still text: a batch of them becomes ids several times faster than one at a time.
    """

    pixels: Pixels
    caption: str
    key: str
    keep: np.ndarray[tuple[int], np.dtype[np.int64]] | None


class Augmentation(NamedTuple):
    """How a training picture is varied; every draw comes from the sample's own generator.

    Attributes:
        crop_scale: Area range of RandomResizedCrop.
        jitter: Colour jitter, or None.
        gray_scale_prob: Share of pictures shown without colour.
        num_tokens: Patches N of the tower.
        patch_drop: Share of them left out.
        decoder: How the crop is decoded.
    """

    crop_scale: tuple[float, float]
    jitter: ColorJitter | None
    gray_scale_prob: float
    num_tokens: int
    patch_drop: float
    decoder: Decoder = "fast"

    def kept_patches(self, rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.int64]] | None:
        """The patches a picture keeps, i64 ``[K]`` in ascending order; None keeps all.

        Drawn with the sample and not in the model, so that they do not depend on ranks or micro-batches.
        """
        # None rather than all indices: gathering every patch would cost a copy of the tokens.
        if not self.patch_drop:
            return None
        # The same number for every picture, so that a batch stays one tensor.
        kept = max(1, round(self.num_tokens * (1 - self.patch_drop)))
        # Sorted: neighbours in the picture stay neighbours in memory.
        return np.sort(rng.permutation(self.num_tokens)[:kept]).astype(np.int64)


class PairSamples:
    """Pairs as pictures with captions; augmented for training, the whole picture for validation."""

    def __init__(
        self,
        pairs: PairSource,
        *,
        size: int,
        max_pixels: int,
        max_bytes: int = MAX_BYTES,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.pairs, self.size = pairs, size
        self.max_pixels, self.max_bytes, self.augmentation = max_pixels, max_bytes, augmentation

    def __len__(self) -> int:
        return len(self.pairs)

    def describe(self, index: int) -> tuple[str, str]:
        """Source and key of a pair."""
        return self.pairs.describe(index)

    def load(self, index: int, rng: np.random.Generator) -> PairSample:
        """Decode and augment one pair."""
        pair = self.pairs.read(index)
        data = pair.image.read(self.max_bytes)
        how = self.augmentation
        # Validation sees every picture whole and always the same.
        if how is None:
            image = decode_image(data, max_pixels=self.max_pixels)
            # Squashed, as prediction shows pictures: a crop could cut off what the caption speaks of.
            return PairSample(fit_square(image, self.size, fit="squash"), pair.caption, pair.name, None)
        # The crop draws first: a recipe without jitter cuts the same crops as one with it.
        pixels = training_crop(data, self.size, rng, scale=how.crop_scale, decoder=how.decoder, max_pixels=self.max_pixels)
        # On the small crop and not on the picture: fewer pixels to change.
        if how.jitter is not None:
            pixels = how.jitter(pixels, rng)
        if how.gray_scale_prob and rng.random() < how.gray_scale_prob:
            pixels = gray_scale(pixels)
        return PairSample(pixels, pair.caption, pair.name, how.kept_patches(rng))


def open_samples(
    data: PairDataConfig, encoder: VisionEncoder, *, patch_drop: float
) -> tuple[PairSamples, PairSamples | None, PairSource]:
    """Training samples, validation samples if the recipe has any, and the source behind the first.

    Raises:
        InputError: As the readers raise it.
    """
    source = open_training_pairs(data)
    jitter = ColorJitter(*data.color_jitter, probability=data.color_jitter_prob) if data.color_jitter else None
    how = Augmentation(data.crop_scale, jitter, data.gray_scale_prob, encoder.num_tokens, patch_drop, data.decoder)
    samples_of = functools.partial(PairSamples, size=encoder.image_size, max_pixels=data.max_pixels, max_bytes=data.max_bytes)
    train = samples_of(source, augmentation=how)
    validation = None
    if data.val:
        held = open_pairs(data.val, options_of(data, data.val_type, data.val_image_root))
        source.left_out.extend(held.left_out)  # one list for the user to look at
        validation = samples_of(held)
    return train, validation, source


def collate_pictures(samples: list[PairSample]) -> Batch:
    """``pixels`` uint8 ``[B, 3, S, S]``, ``keys``, and ``keep`` i64 ``[B, K]`` where patches are dropped."""
    batch: Batch = {"pixels": torch.from_numpy(np.stack([s.pixels for s in samples])), "keys": [s.key for s in samples]}
    if samples[0].keep is not None:
        batch["keep"] = torch.from_numpy(np.stack([s.keep for s in samples if s.keep is not None]))
    return batch
